"""A vote of adapters: the same completions as of each alone, the shared blocks once, and the figures by hand."""

import json
import statistics
from importlib.resources import files

import pytest
import run_records
import torch
from changes import save_adapter
from demo_model import load
from peft import PeftModel
from tuner.helpers import move, tuner_layers, wrap

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rollouts.sampling import Rollout, sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs import VoteSettings, vote
from peft_onelayer.runs.voting import voted
from peft_onelayer.tasks import Task, load_task
from peft_onelayer.tuner.prompts import sharing_prompts

BASE = str(files("peft_onelayer") / "demo_model")


def two_adapters(family="Qwen3"):
    model = wrap(build(family), layer=2)
    model.add_adapter("other", SingleLayerConfig(layer=3))
    move(model, scale=0.3)
    move(model, "other", seed=4, scale=0.3)
    return model.eval()


def generate(model, ids, mask, names=None):
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    if names is not None:
        options["adapter_names"] = names
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize(
    "family", ["Qwen3", *(pytest.param(f, marks=pytest.mark.more) for f in ("Llama", "Gemma3Text"))]
)
def test_what_lies_below_the_lowest_trained_block_runs_once_for_all_adapters(family):
    model = two_adapters(family)
    prompts = token_batch(2, 7)
    prompts[1, :3], mask = 0, torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    ids, masks, names = prompts.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), ["default", "other"] * 2
    rows: dict[int, list[int]] = {k: [] for k in range(4)}
    blocks = model.get_base_model().model.layers
    for k, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, k=k: rows[k].append(len(args[0])))
    with sharing_prompts(model):
        shared = generate(model, ids, masks, names)
    assert [rows[k][0] for k in range(4)] == [2, 2, 2, 4] or [rows[k][0] for k in range(4)] == [2, 2, 4, 4]
    assert all(set(rows[k][1:]) == {4} for k in range(4))
    assert torch.equal(shared, generate(model, ids, masks, names))
    for name in ("default", "other"):
        model.set_adapter(name)
        alone = generate(model, prompts, mask)
        assert torch.equal(shared[0 if name == "default" else 1 :: 2], alone)


def test_an_adapter_of_the_first_block_shares_nothing_and_is_right():
    model = wrap(layer=0)
    model.add_adapter("other", SingleLayerConfig(layer=1))
    move(model, scale=0.3)
    move(model, "other", seed=2, scale=0.3)
    model.eval()
    ids, names = token_batch(1, 6).repeat(2, 1), ["default", "other"]
    with sharing_prompts(model):
        shared = generate(model, ids, torch.ones_like(ids), names)
    assert torch.equal(shared, generate(model, ids, torch.ones_like(ids), names))


@pytest.mark.more
def test_samples_in_turns_are_greedily_those_of_each_adapter(tmp_path):
    base, tokenizer = load()
    for seed, layer in ((0, 5), (1, 8)):
        save_adapter(tmp_path / str(layer), BASE, layer, seed=seed, size=0.01, share=1.0)
    model = PeftModel.from_pretrained(base, str(tmp_path / "5"))
    model.load_adapter(str(tmp_path / "8"), "other")
    model.eval()
    task = load_task("arithmetic")
    rows = task.rows("test", 6, 0)
    cold = Sampling(samples=2, temperature=1e-4, batch_size=7)
    turns = sample_rollouts(model, tokenizer, task, rows, cold, adapters=["default", "other"])
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        alone = sample_rollouts(model, tokenizer, task, rows, Sampling(greedy=True))
        assert [group[i].ids for group in turns] == [group[0].ids for group in alone]
    assert len(tuner_layers(model)) > 0


def rollout(text, reward):
    return Rollout("p", text, reward, 1, True, [1], [2], [True])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [("aab", 1.0), ("abb", 0.0), ("ba", 0.0), ("ab", 1.0), ("??b", 0.0), ("??a", 1.0), ("???", 0.0)],
)
def test_the_majority_and_ties_and_completions_without_an_answer(texts, expected):
    task = Task("t", lambda split, n, seed: [], lambda **_: [], 1, answer=lambda text: None if text == "?" else text)
    assert voted([rollout(text, float(text == "a")) for text in texts], task) == expected


@pytest.mark.more
def test_the_figures(tmp_path):
    for seed, layer in ((0, 5), (1, 6), (2, 8)):
        save_adapter(tmp_path / str(layer), BASE, layer, seed=seed, size=0.003, share=1.0)
    adapters = [str(tmp_path / name) for name in ("5", "6", "8")]
    out = tmp_path / "vote.json"
    settings = VoteSettings(adapters=adapters, task="arithmetic", problems=24, out=out)
    record = vote(settings)
    assert (record.n, record.samples, record.shared_blocks, record.against) == (24, 3, 5, adapters[0])
    assert json.loads((tmp_path / "vote.json").read_text()) == json.loads(record.to_json())
    for ballot in (record.of_adapters, record.of_one):
        assert 0 < ballot.average.mean < ballot.best.mean and ballot.vote.mean <= ballot.best.mean
    assert record.of_adapters.average.mean == pytest.approx(statistics.fmean(f.mean for f in record.averages))
    assert record.difference.mean == pytest.approx(record.of_adapters.vote.mean - record.of_one.vote.mean)
    assert vote(settings).of_adapters == record.of_adapters


def test_what_cannot_vote_is_refused_in_one_line(tmp_path):
    build().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "one", tmp_path / "base", 1)
    save_adapter(tmp_path / "five", BASE, 5)
    one, five = str(tmp_path / "one"), str(tmp_path / "five")
    for settings, match in (
        ({"adapters": [five]}, "two adapters or more"),
        ({"adapters": [five, five], "against": 2}, "none of the 2 adapters"),
        ({"adapters": [five, five], "samples": 0}, "at least 1"),
        ({"adapters": [five, one]}, "made for a model of 4 blocks|belongs to another"),
        ({"adapters": [five, str(tmp_path / "nothing")]}, "no .*folder"),
        (
            {"adapters": [five, str(tmp_path / "base")]},
            "base holds no adapter_config.json, so it is a model and no adapter",
        ),
    ):
        with pytest.raises(ValueError, match=match) as error:
            vote(VoteSettings(task="arithmetic", problems=4, **settings))
        assert "\n" not in str(error.value)


def test_the_problems_that_chose_a_step_are_told_apart(tmp_path):
    for layer in (5, 8):
        save_adapter(tmp_path / str(layer), BASE, layer, seed=layer, size=layer / 50, share=1.0)
    (tmp_path / "8" / "run.json").write_text(run_records.choosing(5).to_json())
    given = {"adapters": [str(tmp_path / "5"), str(tmp_path / "8")], "task": "arithmetic"}
    found = vote(VoteSettings(**given, problems=16, samples=4))
    assert found.watched == 5 and found.unwatched is not None and found.unwatched != found.difference
    only = vote(VoteSettings(**given, problems=2))
    assert (only.watched, only.unwatched) == (2, None)
