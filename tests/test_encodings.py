"""Text is UTF-8 wherever it is read or written, whatever the locale; what a terminal cannot show is no error."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import models
from peft_onelayer import SingleLayerConfig

ROOT = Path(__file__).parents[1]
HELPERS = [path for path in ROOT.glob("tests/**/*.py") if not path.name.startswith("test_")]
MODULES = [*ROOT.glob("peft_onelayer/**/*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("examples/**/*.py")]
MODULES += [*ROOT.glob("docs/*.py")]
LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "cp1252": {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "strict ascii": {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C.UTF-8"},
}
SOME = [name if name == "ascii" else pytest.param(name, marks=pytest.mark.more) for name in LOCALES]
OPENERS = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper"}


def without_encoding(text: str) -> list[str]:
    """The calls that read or write text and do not name the encoding: line and name."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if "encoding" in given:
            continue
        pipe = given.get("text") == "True" or given.get("universal_newlines") == "True"
        if name in ("read_text", "write_text") and not owner:  # a function of ours
            continue
        modes = [] if name.endswith("_text") else [argument for argument in node.args if _is_mode(argument)]
        binary = any("b" in ast.unparse(argument) for argument in modes)
        binary = binary or "b" in given.get("mode", "w+b" if name.endswith("TemporaryFile") else "")
        if pipe or (name in OPENERS and not binary and not (name == "open" and owner in ("os", "tarfile"))):
            found.append(f"{node.lineno}: {name}")
    return found


def _is_mode(argument: ast.expr) -> bool:
    value = getattr(argument, "value", None)
    return isinstance(value, str) and set(value) <= set("rwxabt+") and bool(value)


def test_every_text_names_its_encoding():
    found = {str(p.relative_to(ROOT)): without_encoding(p.read_text(encoding="utf-8")) for p in [*MODULES, *HELPERS]}
    assert {path: calls for path, calls in found.items() if calls} == {} and len(found) > 100


def test_what_the_test_above_sees():
    assert without_encoding("open('a')\nopen('a', 'w')\np.open()\np.read_text()\np.write_text('b')") == [
        *("1: open", "2: open", "3: open", "4: read_text", "5: write_text")
    ]
    assert without_encoding("run(c, text=True)\nos.fdopen(1, 'w')") == ["1: run", "2: fdopen"]
    assert without_encoding("open('a', 'rb')\np.open('r+b')\nos.open('a', 0)\nrun(c)\nopen(a, encoding='utf-8')") == []


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter whose folder and base have names outside of ASCII, with its run.json."""
    from run_records import RECORD

    root = tmp_path_factory.mktemp("files")
    base = models.build(dtype=torch.bfloat16)
    base.save_pretrained(root / "modèle-Ω")
    base.name_or_path = base.config._name_or_path = str(root / "modèle-Ω")
    get_peft_model(base, SingleLayerConfig(layer=1)).save_pretrained(root / "adaptateur-Ω")
    (root / "adaptateur-Ω" / "run.json").write_text(RECORD.to_json(), encoding="utf-8")
    return root / "adaptateur-Ω"


def run(locale, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    environment |= {**LOCALES[locale], "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "onelayer_cli.main", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr and b"codec" not in done.stderr, done.stderr.decode(errors="replace")
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("locale", SOME)
def test_help_and_inspect_in_any_locale(locale, adapter):
    code, out, _ = run(locale, "train", "--help")
    assert code == 0 and out.startswith(b"Usage: onelayer train")
    code, out, err = run(locale, "inspect", adapter)
    assert code == 0 and b"self_attn.q_proj.weight" in out, err
    code, _, err = run(locale, "inspect", adapter.parent / "nicht-da-Ω")
    assert code == 1 and len(err.splitlines()) == 1, err


@pytest.mark.more
@pytest.mark.parametrize("locale", ["ascii", "cp1252"])
def test_push_and_eval_in_any_locale(locale, adapter, tmp_path):
    out = tmp_path / "é.json"
    task = ["--task", "arithmetic", "--problems", "4", "--samples", "2", "--out", out]
    demo = ROOT / "peft_onelayer" / "demo_model"
    code, printed, err = run(locale, "eval", demo, *task)
    assert code == 0 and b"arithmetic" in printed, err
    assert json.loads(out.read_text(encoding="utf-8"))["n"] == 4
    code, printed, err = run(locale, "push", adapter, "me/x", "--dry-run", "--json")
    assert code == 0 and "README.md" in json.loads(printed)["files"], err


CARD = """
import sys
from pathlib import Path
from peft_onelayer.hub.push import stage
staged = Path(sys.argv[2])
stage(Path(sys.argv[1]), staged, "me/x")
"""


@pytest.mark.more
@pytest.mark.parametrize("locale", LOCALES)
def test_what_is_published_is_utf8(locale, adapter, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, "-c", CARD, str(adapter), str(tmp_path)]
    done = subprocess.run(command, env=environment | LOCALES[locale], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    card = (tmp_path / "README.md").read_bytes().decode("utf-8")
    assert "modèle-Ω" in card
    for name in ("run.json", "adapter_config.json"):
        json.loads((tmp_path / name).read_bytes().decode("utf-8"))
