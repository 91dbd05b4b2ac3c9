"""The published profiles: complete, consistent, and the averages that follow from them."""

import json
from importlib.resources import files

import pytest

PROFILES = sorted((files("peft_onelayer") / "profiles").iterdir(), key=lambda p: p.name)


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.name)
def test_a_profile_is_consistent(path):
    profile = json.loads(path.read_text())
    contribution = profile["contribution"]
    measured = [c for c in contribution if c is not None]
    assert path.name == profile["model"].replace("/", "--") + ".json"
    assert len(contribution) == profile["num_layers"]
    assert profile["partial"] == (len(measured) < len(contribution)) and len(measured) >= 2
    assert profile["source"].startswith("Is One Layer Enough? (arXiv 2607.01232)")
    # C(k) = (S_k - S_base) / (S_full - S_base): the best layer's score and its contribution must agree to rounding
    best = (profile["best"] - profile["base"]) / (profile["full"] - profile["base"])
    assert best == pytest.approx(max(measured), abs=0.02)
    # best relative depth k / (L - 1) lies between .37 and .59 in all seven models
    assert 0.365 < contribution.index(max(measured)) / (profile["num_layers"] - 1) < 0.595


def test_seven_models_one_of_them_whole():
    whole = [p for p in PROFILES if not json.loads(p.read_text())["partial"]]
    assert len(PROFILES) == 7
    contribution = json.loads(whole[0].read_text())["contribution"]
    assert [p.name for p in whole] == ["Qwen--Qwen3-1.7B-Base.json"]
    assert sum(contribution) / 28 == pytest.approx(0.73, abs=0.005)  # a random layer
    assert sum(contribution[11:16]) / 5 == pytest.approx(0.98, abs=0.005)  # mid-5
