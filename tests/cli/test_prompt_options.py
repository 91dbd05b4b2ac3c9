"""--system and --shots on the command line reach the settings of every command that gives prompts."""

import pytest

SHAPE = ["--system", "Be short.", "--shots", "2"]


@pytest.mark.parametrize(
    ("command", "function", "rest"),
    [
        ("train", "peft_onelayer.runs.training.train", ["--out", "out"]),
        ("probe", "peft_onelayer.runs.probing.probe", []),
        ("eval", "peft_onelayer.runs.evaluation.evaluate", []),
        ("entropy", "peft_onelayer.runs.forking.entropy", []),
        ("sweep", "peft_onelayer.sweep.sweep.sweep_layers", []),
    ],
)
def test_the_options_reach_the_settings(onelayer, monkeypatch, command, function, rest):
    asked = []

    def stop(settings, **more):
        asked.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(function, stop)
    code, lines, _ = onelayer(command, "m", "--task", "sort", *SHAPE, *rest)
    assert code == 1 and lines[-1].endswith("enough"), lines
    assert (asked[0].system, asked[0].shots) == ("Be short.", 2)
    code, lines, _ = onelayer(command, "m", "--task", "sort", "--shots", "-1", *rest)
    assert code == 2 and len(asked) == 1


def test_the_options_reach_a_transplant(onelayer, monkeypatch):
    asked = []

    def stop(base, full, task, **given):
        asked.append(given)
        raise ValueError("enough")

    monkeypatch.setattr("peft_onelayer.sweep.transplant.transplant_profile", stop)
    rest = ["--plain", "--sampling", "top_p=0.9"]
    code, lines, _ = onelayer("analyze", "m", "n", "--transplant", "sort", *SHAPE, *rest)
    assert code == 1 and lines[-1].endswith("enough"), lines
    assert (asked[0]["chat"], asked[0]["system"], asked[0]["shots"]) == (False, "Be short.", 2)
    assert asked[0]["sampling"] == {"top_p": 0.9}
    for given in (["--plain"], SHAPE, rest[1:]):
        code, lines, _ = onelayer("analyze", "m", "n", *given)
        assert code == 1 and f"{given[0]} is of --transplant; give that too, or leave it out" in lines[-1], lines
    assert len(asked) == 1
