"""What each command says where a task teaches nothing, or a prompt cannot be given: one line, with the option that
mends it, and three completions to read."""

import json
from importlib.resources import files

import pytest

from peft_onelayer.runs.first_rewards import FirstRewards

BASE = str(files("peft_onelayer") / "demo_model")
LIMIT = {"zero": 5, "one": 5, "cut": 2}  # an answer of the demo model has four digits and an end


@pytest.fixture
def task(tmp_path):
    """A task whose every completion gets the same reward; of "cut", because none has an end."""

    def write(kind):
        reward = {"zero": "0.0", "one": "1.0", "cut": "float(len(c) > 3)"}[kind]
        path = tmp_path / f"{kind}.py"
        path.write_text(
            f"MAX_COMPLETION_TOKENS = {LIMIT[kind]}\n\n\n"
            "def rows(split, n, seed):\n    return [{'prompt': f'A{i:03d}+001='} for i in range(100, 100 + n)]\n\n\n"
            f"def reward(prompts, completions, **kwargs):\n    return [{reward} for c in completions]\n"
        )
        return path

    return write


SAID = {
    "zero": "every completion gets 0: the task is too hard for this model, or the reward takes nothing for right; look "
    "at the reward, take an easier task or a larger model, or raise --prompts where right answers are rare.",
    "one": "every completion gets 1: the reward does not tell good from bad, or the model masters the task already; "
    "look at the reward, or take a harder task.",
    "cut": "100% of the completions were cut at the token limit, 2, before they ended: raise it, as with --set "
    "max_completion_length=4; where the answer comes before the cut, look at the reward.",
}
COMMANDS = {
    "train": ["train", BASE, "--layer", "5", "--steps", "8", "--out", "{out}"],
    "train at a rate": ["train", BASE, "--layer", "5", "--steps", "8", "--learning-rate", "1e-3", "--out", "{out}"],
    "train a ranked block": ["train", BASE, "--steps", "40", "--out", "{out}"],
    "train a step": ["train", BASE, "--layer", "5", "--steps", "1", "--set", "learning_rate=1e-3", "--out", "{out}"],
    "probe": ["probe", BASE, "--steps", "40"],
    "sweep": ["sweep", BASE, "--layers", "5", "--workers", "1", "--out", "{out}"],
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        pytest.param(command, kind, marks=[] if (command, kind) == ("probe", "cut") else pytest.mark.more)
        for command in COMMANDS
        for kind in SAID
    ],
)
def test_every_reward_is_equal(onelayer, task, tmp_path, command, kind):
    arguments = [part.format(out=tmp_path / "out") for part in COMMANDS[command]]
    code, lines, out = onelayer(*arguments, "--task", task(kind))
    assert code == 1 and out == ""
    assert sum(line.startswith("completion: ") for line in lines) == 3, lines
    assert lines[-1].startswith("onelayer: the rewards of") and lines[-1].endswith(f"The likely reason: {SAID[kind]}")
    left = [path for path in (tmp_path / "out").rglob("*") if command != "sweep" or path.suffix == ".safetensors"]
    assert not left  # not a checkpoint: the first batch was enough


@pytest.mark.more
def test_a_short_run_looks_at_no_more_than_it_has_itself(onelayer, task, tmp_path):
    arguments = [part.format(out=tmp_path / "out") for part in COMMANDS["train a step"]]
    code, lines, _ = onelayer(*arguments, "--prompts", "16", "--task", task("zero"))
    assert code == 1 and any("up to 128 more of the base" in line for line in lines), lines
    assert "are equal for each of 16 prompts of " in lines[-1]


@pytest.mark.more
def test_a_run_whose_first_step_teaches_nothing_goes_on_as_if_nobody_had_looked(onelayer, tmp_path, monkeypatch):
    source = (
        "MAX_COMPLETION_TOKENS = 5\n\n\n"
        "def rows(split, n, seed):\n    return [{'prompt': f'A{i:03d}+001='} for i in range(100, 100 + n)]\n\n\n"
        "calls = []\n\n\ndef reward(completions, **kwargs):\n    calls.append(1)\n"
        "    return [float(text.count('1')) if len(calls) > 1 else 0.0 for text in completions]\n"
    )
    (task := tmp_path / "late.py").write_text(source)
    options = ["--layer", "5", "--steps", "3", "--learning-rate", "1e-3", "--task", task, "--eval-problems", "0"]
    options += ["--completions", "2"]
    code, lines, _ = onelayer("train", BASE, *options, "--out", tmp_path / "looked")
    assert code == 0 and any("more of the base" in line for line in lines), lines
    monkeypatch.setattr(FirstRewards, "on_log", lambda *args, **kwargs: None)
    assert onelayer("train", BASE, *options, "--out", tmp_path / "plain")[0] == 0
    looked, plain = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("looked", "plain"))
    assert looked == plain


@pytest.mark.more
@pytest.mark.parametrize("kind", SAID)
def test_pairs_of_which_none_differ(onelayer, task, tmp_path, kind):
    offline = ["--algorithm", "dpo", "--pairs-from-task", "4", "--layer", "5", "--out", tmp_path / "out"]
    code, lines, _ = onelayer("train", BASE, "--task", task(kind), *offline)
    said = {
        "zero": "all have the same reward (mean 0); ",
        "one": "all have the same reward (mean 1); ",
        "cut": "all 32 completions were cut before they ended, and none is left; ",
    }
    assert code == 1 and said[kind] in lines[-1] and not (tmp_path / "out").exists(), lines


@pytest.mark.more
@pytest.mark.parametrize("command", [["train", "--layer", "5", "--steps", "1", "--out", "{out}"], ["eval"], ["probe"]])
def test_a_model_without_a_chat_template(onelayer, task, tmp_path, command):
    """Plain prompts are its way; messages are refused before the model is used."""
    name, *options = [part.format(out=tmp_path / "out") for part in command]
    code, lines, _ = onelayer(name, BASE, *options, "--task", "arithmetic", "--chat")
    assert code == 1
    assert lines[-1] == "onelayer: --chat needs a chat template, and the model's tokenizer has none; use --plain"
    prompts = tmp_path / "chats.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"A{i}+1="}], "answer": 1} for i in range(100, 164)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["--dataset", prompts, "--reward", f"{task('one')}:reward"]
    code, lines, _ = onelayer(name, BASE, *options, *source)
    assert code == 1 and "are chat messages" in lines[-1] and "no chat template" in lines[-1], lines
    if name == "train":
        assert not (tmp_path / "out").exists()
        code, lines, _ = onelayer(name, BASE, *options, "--task", "arithmetic", "--eval-problems", "0")
        assert (
            code == 0 and json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["task"]["chat"] is False
        )


@pytest.mark.parametrize("rate", [[], ["--learning-rate", "1e-3"]])
def test_a_completion_that_the_context_has_no_room_for(onelayer, task, tmp_path, rate):
    """TRL would generate behind the context's end."""
    long = ["--layer", "5", "--steps", "1", "--set", "max_completion_length=60", *rate, "--out", tmp_path / "out"]
    code, lines, _ = onelayer("train", BASE, "--task", task("zero"), *long)
    assert code == 1 and len(lines) == 1 and "a completion of up to 60 do not fit into the model's context" in lines[0]
    assert not (tmp_path / "out").exists()
