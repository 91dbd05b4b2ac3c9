"""load_profile: the figures that the package ships, and those published beside an adapter."""

import json
import re

import pytest

import peft_onelayer
from peft_onelayer.hub.profiles import shipped_profiles
from peft_onelayer.records.ranking import LayerRanking


def test_the_shipped_profiles_are_the_papers():
    assert len(shipped_profiles()) == 7
    profile = peft_onelayer.load_profile("Qwen/Qwen3-1.7B-Base")
    assert (profile.num_layers, len(profile.scores), profile.scores.count(None)) == (28, 28, 0)
    assert (profile.scores[10], profile.scores[24]) == (1.14, 0.28)  # best and worst of FACTS.md's table
    assert (profile.sweep.base, profile.sweep.full, profile.method) == (44.1, 50.8, "published")
    assert profile.sweep.contribution == profile.worth == profile.scores
    assert (profile.pick, profile.choice) == (10, [10])
    assert "2607.01232" in profile.source and profile.sweep.algorithm == "grpo"
    partial = peft_onelayer.load_profile("Qwen/Qwen3-8B-Base")
    assert None in partial.scores and (partial.scores[16], partial.scores[0], partial.scores[1]) == (1.07, -0.51, None)


def test_one_beside_an_adapter(hub, ask, adapter):
    here = peft_onelayer.load_profile(str(adapter))
    assert (here.scores, here.method, here.task) == ([0.01, 0.031, None, -0.02], "race", "gsm8k")
    assert peft_onelayer.load_profile(str(adapter / "layer_profile.json")) == here
    assert ask("push", adapter, "me/gsm").code == 0
    code = "import dataclasses, peft_onelayer; result = dataclasses.asdict(peft_onelayer.load_profile('me/gsm'))"
    published = ask(code=code).result
    commit = hub.repos["me/gsm"].branches["main"]
    assert (published["scores"], published["model"]) == (here.scores, "tiny-base")
    assert published["source"] == f"me/gsm at {commit[:12]}"


def test_nothing_of_this_machine_is_published_with_a_profile(ask, adapter, hub):
    profile = json.loads((adapter / "layer_profile.json").read_text())
    profile["fallback"] = f"no race: {adapter}/rows.jsonl has no reward"
    (adapter / "layer_profile.json").write_text(json.dumps(profile))
    assert ask("push", adapter, "me/gsm").code == 0
    published = json.loads(hub.files("me/gsm")["layer_profile.json"])
    assert published == profile | {"model": "tiny-base", "fallback": "no race: rows.jsonl has no reward"}


def test_one_line_says_what_is_wrong(hub, ask, adapter, tmp_path):
    hub.add("me/bare", {"README.md": b""})
    for name, message in (("me/bare", "layer_profile.json"), ("me/nothing", "no model me/nothing")):
        code = f"""
import peft_onelayer
try:
    peft_onelayer.load_profile({name!r})
except ValueError as error:
    result = str(error)
"""
        answer = ask(code=code)
        assert message in answer.result and "\n" not in answer.result, answer
    with pytest.raises(ValueError, match=r"no layer profile \./nowhere: give one of Qwen/"):
        peft_onelayer.load_profile("./nowhere")
    with pytest.raises(ValueError, match="no layer profile"):
        peft_onelayer.load_profile(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "theirs"}, 'layer_profile.json holds no layer profile: its "format" is theirs, expected onelayer-'),
        ({"num_layers": 5}, "layer_profile.json: scores has 4 entries, expected 5, one per block"),
        ({"num_layers": True}, "layer_profile.json: num_layers is True, expected an integer"),
        ({"scores": "many"}, "layer_profile.json: scores is many, expected a list of a number or null"),
        ({"scores": None}, "layer_profile.json: scores is None, expected a list"),
        ({"scores": [0.1, 0.2, None, "x"]}, r"layer_profile.json: scores[3] is x, expected a number or null"),
        ({"scores": [0.1, 0.2, None, float("nan")]}, "layer_profile.json: scores holds a number that is not finite"),
        ({"method": None}, "layer_profile.json: method is None, expected text"),
        ({"pick": 4}, "layer_profile.json: pick names a block that is not one of 0 to 3"),
    ],
)
def test_a_damaged_profile_is_refused_by_its_field(adapter, change, message):
    path = adapter / "layer_profile.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        peft_onelayer.load_profile(str(adapter))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="a stranger's is not JSON"):
        LayerRanking.from_json("[" * 100_000, "a stranger's")


def test_a_sweeps_profile_is_read_and_pushed_as_it_is(ask, adapter, hub):
    ranking = json.loads((adapter / "layer_profile.json").read_text())
    measured = {
        **ranking,
        "format": "onelayer-sweep-1",
        "method": "sweep",
        "contribution": [0.2, 0.9, None, 0.1],
        "base": 0.2,
        "full": 0.6,
        "contribution_errors": [0.1] * 4,
        "undefined": None,
        "means": [0.3, 0.5, None, 0.2],
        "base_error": 0.01,
        "full_gain": [0.4, 0.02],
        "full_learning_rate": 1e-6,
        "learning_rate_search": None,
        "algorithm": "grpo",
        "settings": {},
        "steps": 9,
        "seeds": [0],
        "problems": 64,
        "samples": 4,
        "split": "test",
        "stopped": {},
        "greedy": None,
    }
    (adapter / "layer_profile.json").write_text(json.dumps(measured))
    here = peft_onelayer.load_profile(str(adapter))
    assert (here.worth, here.scores) == (measured["contribution"], measured["scores"])
    assert (here.sweep.base, here.sweep.full) == (0.2, 0.6)
    assert ask("push", adapter, "me/sweep").code == 0
    published = json.loads(hub.files("me/sweep")["layer_profile.json"])
    assert published["contribution"] == measured["contribution"] and published["format"] == "onelayer-sweep-1"
