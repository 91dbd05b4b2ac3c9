"""The example scripts run from beginning to end, with few steps, in an empty folder."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "examples" / "scripts"
SAYS = {  # what each prints at its end
    "combining": "sort with ",
    "dpo": "loss 0.6",
    "dr_grpo": "held-out problems",
    "gigpo_agent": "score of the first and the last step",
    "grpo": "held-out reward",
    "merging_for_vllm": "bit for bit: True",
    "probing": "train [",
    "sharing": "adapter_model.safetensors (",
    "sweep": "block 11: C = ",
}


def test_every_script_is_tried_short_and_says_how_it_goes_with_a_large_model():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in SCRIPTS.glob("*.py")}
    assert scripts.keys() == SAYS.keys()
    for text in scripts.values():
        assert len(text.splitlines()) < 80 and "On a large model" in text


@pytest.mark.more
@pytest.mark.parametrize("name", sorted(SAYS))
def test_a_script(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    steps = "60" if name == "probing" else "2"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", steps, "--out", str(tmp_path / "out")])
    if name == "probing":
        sys.argv[-1] += ".json"
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
