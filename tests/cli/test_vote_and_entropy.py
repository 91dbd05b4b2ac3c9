"""`onelayer vote` and `onelayer entropy`: what they print is what the library finds."""

import json
from importlib.resources import files

import pytest
from changes import save_adapter

from peft_onelayer.runs import EntropySettings, VoteSettings, entropy, vote

BASE = str(files("peft_onelayer") / "demo_model")
TASK = {"task": "arithmetic", "problems": 8}
OPTIONS = ["--task", "arithmetic", "--problems", "8"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, layer in ((0, 5), (1, 8)):
        save_adapter(root / str(layer), BASE, layer, seed=seed, size=0.003, share=1.0)
    return [str(root / "5"), str(root / "8")]


def test_a_vote(onelayer, adapters, tmp_path):
    code, lines, out = onelayer("vote", *adapters, *OPTIONS, "--samples", "2", "--out", tmp_path / "vote.json")
    assert code == 0, lines
    found = vote(VoteSettings(adapters=adapters, samples=2, **TASK))
    written = json.loads((tmp_path / "vote.json").read_text())
    expected = json.loads(found.to_json())
    assert written.pop("command").startswith("onelayer vote") and "command" not in expected
    assert written == expected
    assert "8 problems, 4 completions of each" in out and "the lowest 5 blocks ran once for all adapters" in out
    for ballot in (found.of_adapters, found.of_one):
        assert f"{ballot.vote.mean:.4f}" in out and f"{ballot.best.mean:.4f}" in out
    assert f"{found.difference.mean:+.4f}" in out


@pytest.mark.more
def test_a_vote_as_json(onelayer, adapters):
    code, _, out = onelayer("vote", *adapters, *OPTIONS, "--json")
    assert code == 0 and json.loads(out)["format"] == "onelayer-vote-1"


@pytest.mark.more
def test_the_signal_by_entropy(onelayer, adapters):
    code, lines, out = onelayer("entropy", BASE, *OPTIONS, "--adapter", adapters[0], "--json")
    assert code == 0, lines
    found = entropy(EntropySettings(model=BASE, adapter=adapters[0], **TASK))
    assert json.loads(out) == json.loads(json.dumps(found.to_json()))


@pytest.mark.more
def test_the_table_of_the_signal(onelayer):
    code, lines, out = onelayer("entropy", BASE, *OPTIONS, "--layer", "5", "--share", "0.3")
    assert code == 0, lines
    found = entropy(EntropySettings(model=BASE, layer=5, share=0.3, **TASK))
    assert "top 30% by entropy" in out and f"{found.high.signal:.1%}" in out and f"{found.rest.tokens:,}" in out
