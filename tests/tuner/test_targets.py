"""`target_modules` that may come from a stranger's file."""

import json
import re
import resource
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from models import build
from peft_onelayer.records.files import CONFIG
from peft_onelayer.tuner.targets import matches
from tuner.helpers import masters, wrap

NAME = "self_attn.q_proj"
PREFIX = "model.layers.1."
HANGING = [
    "(a|a|l|l)*" * 20 + "!",
    "(.*)*(.*)*(.*)*!",
    "(.|.)" * 39 + "!",
    ".?" * 300 + "x" * 40,
    "(x+x+)+y|(\\w+\\w+)+!",
]
HANGING += [".*" * 40 + "!"]
GROWING = [
    "a{999999999}",
    "((a{1,99}){1,99}){1,99}",
    "(?:(?:a{0,9999}){0,9999})b",
    "a{99}{99}{99}",
    "(?e)(?:aaaa){e<=50}",
]
GROWING += ["(" * 900, "(?R)", "(?P<n>a)", "a{e<=50}", "(" * 500 + ")" * 500, "(?i)a", "a{100}", "a{1,100}"]
WRONG = ["[", "(", "*", "a**b(", "\\", "a|*", "(?<=a*"]


@pytest.mark.parametrize("pattern", HANGING + GROWING + WRONG, ids=lambda pattern: pattern[:20])
def test_an_expression_that_hangs_grows_or_is_none_is_refused_or_matched_soon(pattern):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
    start = time.process_time()
    try:
        assert matches(pattern, NAME, whole=True, prefix=PREFIX) is False
    except ValueError as error:
        assert str(error).startswith("target_modules ") and len(str(error)) < 500 and str(error).isprintable()
        assert re.search("takes more than|more than 40 groups|is no regular expression", str(error))
    else:
        assert pattern not in GROWING + WRONG
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        (r".*\.(q|k)_proj", True),
        (r"^(?!.*mlp).*q_proj$", True),
        (r"model\.layers\.\d{1,2}\.self_attn\.[qk]_proj", True),
        (r"self_attn\..*", True),
        ("self.attn.q_proj", True),
        (r"mlp\..*", False),
        (r".*(?<=q)_proj", True),
    ],
)
def test_plain_expressions_match_as_re_does(pattern, want):
    assert matches(pattern, NAME, whole=True, prefix=PREFIX) is want
    assert any(re.fullmatch(pattern, name) for name in (NAME, PREFIX + NAME)) is want


def test_what_is_saved_holds_names(tmp_path):
    model = wrap(build(), layer=1, target_modules=r".*\.(q|k)_proj")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert saved == ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"]
    loaded = masters(PeftModel.from_pretrained(build(), tmp_path))
    assert loaded.keys() == masters(model).keys()
    assert all(torch.equal(loaded[name], master) for name, master in masters(model).items())
    assert model.peft_config["default"].target_modules == saved


def test_a_files_expression_is_bounded(tmp_path):
    wrap(build(), layer=1, target_modules="self_attn").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == "self_attn"
    for pattern, match in (
        ("(.*)*(.*)*(.*)*!", "takes more|matches nothing"),
        ("a" * 1001, "has 1,001 characters"),
        (3, "is 3"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": pattern}))
        with pytest.raises(ValueError, match=match):
            PeftModel.from_pretrained(build(), tmp_path)


def test_modules_to_save_is_no_expression(tmp_path):
    start = time.process_time()
    wrap(build(), layer=1, modules_to_save=["(a|a|l|l|.)*" * 20 + "!"])
    assert time.process_time() - start < 5


def test_a_range_without_end_is_refused_at_once():
    for layer in ("0-99999999999999", "5-3000000000,1"):
        with pytest.raises(ValueError, match="is out of range"):
            wrap(build(), layer=layer)


@pytest.mark.parametrize("pattern", [*WRONG, HANGING[0], HANGING[1], "(e|e|m|b)*" * 9 + "(_|t|o|k|n|s)*" * 9 + "!"])
def test_peft_is_never_given_an_expression(pattern):
    """It would match it with the names of embeddings first, by `re`."""
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^target_modules ") as error:
        wrap(layer=1, target_modules=pattern)
    assert type(error.value) is ValueError and len(str(error.value)) < 500
    assert time.process_time() - start < 5
