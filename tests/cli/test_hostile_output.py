"""What a stranger wrote never steers the terminal, forges a line, or is taken for markup, on either stream."""

import io
import json
import shutil
import sys

import pytest
import torch
from peft import get_peft_model
from rich.console import Console

import models
from onelayer_cli import _output
from peft_onelayer import SingleLayerConfig
from peft_onelayer.records.files import CONFIG

EVIL = "name\nbase: forged\r\x1b[2J\u202egnp\u2028[/b][bold]\x00" + "x" * 10**5


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    models.build("Qwen2", dtype=torch.bfloat16).save_pretrained(root / "base")
    model = get_peft_model(models.build("Qwen2", dtype=torch.bfloat16), SingleLayerConfig(layer=1))
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.requires_grad
    model.save_pretrained(root / "adapter")
    return root


@pytest.mark.parametrize("name", ["a[/b]", "[bold]x", "a[b]c", "[/]", "x\\[y]"])
def test_a_folder_that_looks_like_markup(onelayer, adapter, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter / "adapter", tmp_path / name)
    code, lines, out = onelayer("inspect", f"./{name}")
    assert (code, lines) == (0, []) and f"./{name}: block 1 of 4, model.layers.1.*" in out
    for command in (
        ("merge", adapter / "base", f"./{name}", f"./{name}-merged"),
        ("export", f"./{name}", f"./{name}-dense", "--format", "dense"),
    ):
        code, lines, out = onelayer(*command)
        assert code == 0, lines
        assert name in out
    code, lines, out = onelayer("inspect", f"./{name}-nowhere")
    assert (code, len(lines)) == (1, 1) and f"{name}-nowhere" in lines[0]


@pytest.mark.more
def test_fields_that_a_stranger_wrote(onelayer, adapter, tmp_path):
    folder = tmp_path / "a"
    for field in ("peft_version", "base_model_name_or_path", "revision", "task_type"):
        shutil.copytree(adapter / "adapter", folder, dirs_exist_ok=True)
        config = json.loads((folder / CONFIG).read_text())
        for value in (EVIL, EVIL[:90]):
            (folder / CONFIG).write_text(json.dumps(config | {field: value}))
            code, lines, out = onelayer("inspect", folder)
            assert "\x1b" not in out and "\u202e" not in out and "\u2028" not in out and "\r" not in out
            assert not any(line.startswith("base: forged") for line in [*out.splitlines(), *lines])
            assert len(lines) == code and all(len(line) < 700 for line in [*out.splitlines(), *lines])
            code, lines, out = onelayer("merge", adapter / "base", folder, tmp_path / "out")
            assert all(line.isprintable() and len(line) < 700 for line in lines)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_every_way_of_printing_is_plain(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(_output, "err", Console(file=err, force_terminal=True, width=200, color_system=None))
    _output.print_line(EVIL)
    _output.note(EVIL)
    _output.print_table(EVIL[:60], ["tensor", "[/b]"], [[EVIL[:60], "[/b]"]])
    with _output.status(EVIL[:60]), _output.progress_bar(EVIL[:60], 3) as bar:
        bar.update(2, EVIL[:60])
    printed = out.getvalue() + err.getvalue()
    assert "\x1b[2J" not in printed and "\u202e" not in printed and "\u2028" not in printed and "\x00" not in printed
    assert not any(line.startswith("base: forged") for line in printed.splitlines())
    assert "[/b][bold]" in printed and max(map(len, printed.splitlines())) < 10_000
