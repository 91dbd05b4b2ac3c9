"""`onelayer train` on the embedded model: what it trains, writes, repeats, resumes and refuses."""

import json
import shlex
import signal
import subprocess
import sys
import time
from importlib.resources import files

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BASE = str(files("peft_onelayer") / "demo_model")
SMALL = ["--set", "per_device_train_batch_size=32", "--set", "gradient_checkpointing=false"]
FAST = [*SMALL, "--set", "learning_rate=3e-3"]
ON_BLOCK_5 = ["train", BASE, "--task", "arithmetic", "--layer", "5", *FAST]


@pytest.fixture
def train(tmp_path, onelayer):
    """Runs the command and returns the finished run.json, and the folder."""

    def run(*arguments, out="run"):
        code, lines, _ = onelayer(*arguments, "--out", tmp_path / out)
        assert code == 0, lines
        return json.loads((tmp_path / out / "run.json").read_text()), tmp_path / out

    return run


def changed_tensors(folder) -> set[str]:
    """Names of the base's tensors that the merged adapter, or the saved model, has other values of."""
    base = dict(AutoModelForCausalLM.from_pretrained(BASE).named_parameters())
    if (folder / "adapter_config.json").exists():
        model = AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    after = dict(model.named_parameters())
    assert after.keys() == base.keys()
    return {name for name in base if not torch.equal(base[name], after[name])}


def tensors_of(*blocks) -> set[str]:
    names = dict(AutoModelForCausalLM.from_pretrained(BASE).named_parameters())
    return {n for n in names if not blocks or (n.split(".")[2:3] and n.split(".")[2] in map(str, blocks))}


GRPO_OR_DR_GRPO = ["grpo", pytest.param("dr_grpo", marks=pytest.mark.more)]


@pytest.mark.parametrize("algorithm", GRPO_OR_DR_GRPO)
def test_it_trains_the_block_and_records_the_run(train, algorithm):
    run, folder = train(*ON_BLOCK_5, "--steps", "3", "--algorithm", algorithm)
    assert changed_tensors(folder) == tensors_of(5)
    assert {p.name for p in folder.iterdir()} == {
        *(
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "checkpoints",
            "log.jsonl",
            "run.json",
            "run.yaml",
        )
    }
    assert not list(folder.glob("*.bin"))
    config = run["settings"]["config"]
    assert (config["loss_type"], config["scale_rewards"], config["beta"]) == {
        "grpo": ("grpo", "group", 0.001),
        "dr_grpo": ("dr_grpo", "none", 0.0),
    }[algorithm]
    assert config["learning_rate"] == 3e-3 and config["max_steps"] == 3
    assert run["status"] == "finished" and run["layers"] == [5]
    results = run["results"]
    assert results["steps"] == len(results["rewards"]) == len(results["losses"]) == 3
    # 32 completions of at most 5 tokens to prompts of 9, three times
    assert results["tokens_trained"] == results["tokens_generated"] + 3 * 32 * 9
    assert 3 * 32 * 4 < results["tokens_generated"] <= 3 * 32 * 5
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert [line["reward"] for line in log] == results["rewards"]
    assert [line["loss"] for line in log] == results["losses"]
    assert log[2]["running_mean"] == pytest.approx(sum(results["rewards"]) / 3, abs=1e-12)
    assert sum(line["length"] for line in log) * 32 == pytest.approx(results["tokens_generated"], abs=1e-3)
    assert all(("kl" in line) == (config["beta"] > 0) and line["seconds"] > 0 for line in log)
    assert [line["learning_rate"] for line in log] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert run["machine"]["versions"].keys() >= {"torch", "trl", "peft", "transformers", "python"}
    assert set(run["settings"]["model"]["sha256"]) == {"config.json", "model.safetensors"}
    card = (folder / "README.md").read_text()
    assert "block 5 of 12" in card and run["command"] in card


@pytest.mark.more
def test_the_command_of_run_json_repeats_the_run(train, onelayer, tmp_path):
    run, folder = train(*ON_BLOCK_5, "--steps", "4", "--seed", "3")
    repeated = [str(tmp_path / "again") if part == str(folder) else part for part in shlex.split(run["command"])]
    assert onelayer(*repeated[1:])[0] == 0
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    assert again["results"]["sha256"] == run["results"]["sha256"]
    assert again["settings"] == run["settings"]
    other, _ = train(*ON_BLOCK_5, "--steps", "4", "--seed", "4", out="other")
    assert other["results"]["sha256"] != run["results"]["sha256"]


@pytest.mark.more
@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(train, onelayer, tmp_path, signum):
    arguments = [*ON_BLOCK_5, "--steps", "20"]
    out = tmp_path / "killed"
    running = subprocess.Popen(
        [sys.executable, "-m", "onelayer_cli.main", *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as on a terminal: a test run started in the background inherits an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not (out / "checkpoints" / "checkpoint-8" / "trainer_state.json").exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        running.send_signal(signum)
        assert running.wait(timeout=60) == (130 if signum == signal.SIGINT else -signal.SIGKILL)
    finally:
        running.kill()
        running.communicate()
    assert not (out / "adapter_config.json").exists()
    for wrong, message in (
        ([], "unfinished run; continue it with --resume"),
        (
            ["--resume", "--seed", "1"],
            "other settings, so it cannot go on with these: config.seed: 0 -> 1; seed: 0 -> 1",
        ),
    ):
        code, lines, _ = onelayer(*arguments, *wrong, "--out", out)
        assert code == 1 and len(lines) == 1 and message in lines[0]
    resumed, _ = train(*arguments, "--resume", out="killed")
    assert resumed["resumed_from"]
    whole, _ = train(*arguments, out="whole")
    assert resumed["results"]["sha256"] == whole["results"]["sha256"]
    assert resumed["results"]["rewards"] == whole["results"]["rewards"]
    assert resumed["results"]["tokens_generated"] == whole["results"]["tokens_generated"]
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("killed", "whole")]
    for log in logs:
        assert [line["step"] for line in log] == list(range(1, 21))
        assert all(line.pop("seconds") > 0 for line in log)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("algorithm", GRPO_OR_DR_GRPO)
def test_full_trains_everything(train, algorithm):
    arguments = ["train", BASE, "--task", "arithmetic", "--full", "--steps", "2", *SMALL, "--set", "learning_rate=3e-4"]
    run, folder = train(*arguments, "--algorithm", algorithm)
    assert changed_tensors(folder) == tensors_of()
    assert run["layers"] is None and run["settings"]["full"] is True
    assert not list(folder.glob("*.bin"))


@pytest.mark.parametrize(
    ("layer", "blocks"), [("-1,3-4", [3, 4, 11]), pytest.param("mid-5", [3, 4, 5, 6, 7], marks=pytest.mark.more)]
)
def test_layers_as_the_tuner_takes_them(train, layer, blocks):
    run, folder = train("train", BASE, "--task", "sort", "--layer", layer, "--steps", "1", *FAST)
    assert run["layers"] == blocks and changed_tensors(folder) == tensors_of(*blocks)


@pytest.mark.more
def test_auto_ranks_first(train, onelayer, tmp_path):
    wide = ["--set", "per_device_train_batch_size=256", *FAST[2:]]  # few, large batches
    run, folder = train("train", BASE, "--task", "arithmetic", "--steps", "16", *wide)
    profile = json.loads((folder / "layer_profile.json").read_text())
    assert profile["method"] == "auto" and len(profile["order"]) == 12 and profile["learning_rate"] == 3e-3
    assert profile["cost"]["share"] <= 0.25
    assert run["layers"] == ([profile["pick"]] if profile["pick"] is not None else [3, 4, 5, 6, 7])
    assert changed_tensors(folder) == tensors_of(*run["layers"])


def test_auto_without_room_for_a_race_goes_by_depth(train):
    run, folder = train("train", BASE, "--task", "arithmetic", "--steps", "1", *FAST)
    profile = json.loads((folder / "layer_profile.json").read_text())
    assert profile["method"] == "prior" and run["layers"] == [5] and "by depth alone" in run["why"]


@pytest.mark.parametrize(
    ("reward", "layer", "reason"),
    [
        (0.0, "auto", "too hard for this model"),
        pytest.param(1.0, "5", "masters the task already", marks=pytest.mark.more),
        pytest.param(0.0, "6", "too hard", marks=pytest.mark.more),
    ],
)
def test_where_every_reward_is_equal_the_run_stops_and_shows_three_completions(
    onelayer, tmp_path, reward, layer, reason
):
    (tmp_path / "r.py").write_text(f"def reward(completions, **kwargs):\n    return [{reward}] * len(completions)\n")
    rows = [{"prompt": f"A{i:03d}+001="} for i in range(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset", tmp_path / "prompts.jsonl", "--reward", f"{tmp_path / 'r.py'}:reward"]
    arguments = ["train", BASE, *data, "--layer", layer, "--steps", "8", "--set", "max_completion_length=5"]
    code, lines, _ = onelayer(*arguments, "--out", tmp_path / "run")
    assert code == 1 and not (tmp_path / "run").exists()
    assert sum(line.startswith("completion: ") for line in lines) == 3
    assert reason in lines[-1] and "there is nothing to learn from" in lines[-1]


def test_the_defaults_train_a_block_that_moves(train):
    """Model, task and folder alone, with the block given to save the ranking's time, and few steps."""
    run, folder = train("train", BASE, "--task", "arithmetic", "--layer", "6", "--steps", "2")
    config, found = run["settings"]["config"], run["learning_rate"]
    assert (config["per_device_train_batch_size"], config["gradient_accumulation_steps"]) == (8, 8)
    assert config["num_generations"] == 8
    assert found["by"] == "first step" and 0.01 <= found["kl"] <= 0.025 and found["asked"] == 5e-6
    assert config["learning_rate"] > 100 * 5e-6
    assert changed_tensors(folder) == tensors_of(6)


@pytest.mark.parametrize("algorithm", ["dpo", pytest.param("kto", marks=pytest.mark.more)])
def test_offline_on_pairs_from_graded_rollouts(train, algorithm):
    arguments = ["train", BASE, "--algorithm", algorithm, "--task", "arithmetic", "--pairs-from-task", "40"]
    run, folder = train(*arguments, "--layer", "5", "--steps", "2", *FAST)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all(set(pair) == set(pairs[0]) for pair in pairs)
    assert changed_tensors(folder) == tensors_of(5)
    assert len(run["results"]["losses"]) == 2 and run["results"]["rewards"] == []


@pytest.mark.more
def test_offline_on_a_file_of_preferences(train, tmp_path):
    rows = [{"prompt": f"A{i:03d}+001=", "chosen": f"{i + 1:04d}", "rejected": f"{i + 2:04d}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train", BASE, "--algorithm", "dpo", "--dataset", tmp_path / "pairs.jsonl", "--layer", "2", *SMALL]
    run, folder = train(*arguments, "--set", "num_train_epochs=2", "--set", "learning_rate=1e-3")
    assert changed_tensors(folder) == tensors_of(2)
    assert run["results"]["steps"] == 2  # two epochs of 16 rows in batches of 32
    assert run["settings"]["dataset"]["data"]["pairs.jsonl"]
    again, _ = train(
        *arguments,
        "--set",
        "num_train_epochs=2",
        "--set",
        "learning_rate=1e-3",
        "--prefix-cache",
        tmp_path / "c",
        out="again",
    )
    assert len(list((tmp_path / "c").glob("*/*.safetensors"))) == 16  # each pair in one row
    assert again["results"]["losses"] == pytest.approx(run["results"]["losses"], abs=1e-4)


@pytest.mark.more
def test_top_entropy_is_ours_and_not_trls(train):
    options = ["--top-entropy", "0.2", "--set", "loss_type=dapo"]
    ours, folder = train(*ON_BLOCK_5, "--steps", "2", *options)
    assert ours["settings"]["config"]["top_entropy_quantile"] == 0.2 and changed_tensors(folder) == tensors_of(5)
    options = ["--set", "top_entropy_quantile=0.2", "--set", "loss_type=dapo"]
    trls, _ = train(*ON_BLOCK_5, "--steps", "2", *options, out="trl")
    assert trls["results"]["sha256"] != ours["results"]["sha256"]


@pytest.mark.more
def test_what_trl_prints_of_completions_stays_off_stdout(onelayer, tmp_path):
    options = ["--steps", "1", "--prompts", "1", "--completions", "2", "--learning-rate", "1e-3"]
    options += ["--set", "log_completions=true", "--eval-problems", "0", "--json"]
    code, _, out = onelayer("train", BASE, "--task", "arithmetic", "--layer", "5", *options, "--out", tmp_path / "run")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "run" / "run.json").read_text())


def test_json_is_run_json(onelayer, tmp_path):
    code, _, out = onelayer(*ON_BLOCK_5, "--steps", "1", "--json", "--out", tmp_path / "run")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "run" / "run.json").read_text())
    assert load_file(tmp_path / "run" / "adapter_model.safetensors")


T = ["--task", "arithmetic"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "give --task, or --dataset with --reward"),
        ([*T, "--dataset", "x.jsonl"], 1, "not both"),
        (["--dataset", "x.jsonl"], 1, "give --task, or --dataset with --reward"),
        (["--task", "poetry"], 1, "task 'poetry' is not known"),
        ([*T, "--algorithm", "gpro"], 1, "algorithm 'gpro' is not known; did you mean gspo or grpo"),
        ([*T, "--algorithm", "gold"], 1, "is not offered: it distills a second, teacher model"),
        ([*T, "--set", "leaning_rate=1"], 1, "has no field 'leaning_rate'; did you mean learning_rate"),
        ([*T, "--set", "learning_rate=fast"], 1, "expected a number"),
        (
            [*T, "--learning-rate", "fast"],
            2,
            "expected a number such as 1e-5, or auto for one that is found; got 'fast'",
        ),
        ([*T, "--set", "learning_rate"], 1, "--set takes field=value"),
        ([*T, "--set", "seed=1"], 1, "field seed is set by --seed"),
        ([*T, "--set", "per_device_train_batch_size=7"], 1, "must be divisible by num_generations"),
        (
            [*T, *SMALL, "--prompts", "3"],
            1,
            "=32 do not divide; give one that does, such as --set per_device_train_batch_s",
        ),
        ([*T, "--layer", "12"], 1, "the model has 12 blocks"),
        ([*T, "--layer", "5", "--full"], 1, "give one of them"),
        ([*T, "--layer", "auto", "--full"], 1, "--layer auto a block; give one of them"),
        ([*T, "--algorithm", "dpo"], 1, "dpo is offline and trains on preference data"),
        ([*T, "--algorithm", "dpo", "--pairs-from-task", "9"], 1, "name one, such as mid-5"),
        ([*T, "--pairs-from-task", "9"], 1, "grpo generates its own"),
        (["--algorithm", "kto", "--dataset", "no.jsonl", "--layer", "5"], 1, "no file or folder no.jsonl"),
        ([*T, "--algorithm", "gigpo"], 1, "gigpo needs a task with an environment"),
        ([*T, "--top-entropy", "1.5"], 1, "--top-entropy takes a share between 0 and 1"),
        ([*T, "--algorithm", "rloo", "--top-entropy", "0.2"], 1, "--top-entropy"),
        ([*T, "--chat"], 1, "--chat needs a chat template, and the model's tokenizer has none; use --plain"),
        ([*T, "--resume"], 1, "holds no run to resume"),
        ([*T, "--steps", "0"], 2, "--steps"),
        ([*T, "--lyaer", "5"], 2, "No such option: --lyaer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(onelayer, tmp_path, arguments, code, message):
    ended, lines, out = onelayer("train", BASE, *arguments, "--out", "run")
    assert ended == code and len(lines) == 1, lines
    assert message in lines[0], lines
    assert out == ""


@pytest.fixture
def asked(onelayer, tmp_path, monkeypatch):
    """Runs the command up to the run, and returns the settings that it would have."""

    def run(*arguments, yaml=None):
        found = []

        def stop(settings, **_):
            found.append(settings)
            raise ValueError("stopped")

        if yaml is not None:
            (tmp_path / "own.yaml").write_text(f"model: {BASE}\ntask: arithmetic\nlayer: 5\n{yaml}")
            arguments = ["train", "--config", tmp_path / "own.yaml", *arguments]
        with monkeypatch.context() as patch:
            patch.setattr("peft_onelayer.runs.training.train", stop)
            code, lines, _ = onelayer(*arguments, "--out", tmp_path / "run")
        assert code == 1 and lines[-1] == "onelayer: stopped", lines
        return found[0]

    return run


def test_a_learning_rate_that_is_auto_is_found_over_a_file_too(asked):
    rates = "learning_rate: 1e-5\nfull_learning_rate: 1e-6\n"
    auto = ["--learning-rate", "auto"]
    assert asked(yaml=rates).learning_rate == 1e-5
    assert asked(*auto, yaml=rates).learning_rate is None
    assert asked(*auto, "--full", yaml=rates).learning_rate is None
    assert asked(yaml="learning_rate: auto\n").learning_rate is None
    assert asked("--learning-rate", "1e-3", yaml="learning_rate: auto\n").learning_rate == 1e-3


@pytest.mark.parametrize("check", ["runs.early.check_probe", "sweep.early.check_sweep"])
def test_the_other_commands_take_auto_too(onelayer, monkeypatch, check):
    def stop(settings):
        raise ValueError(f"the rate is {settings.learning_rate}")

    monkeypatch.setattr(f"peft_onelayer.{check}", stop)
    for rate, read in (("auto", "None"), ("1e-3", "0.001")):
        code, lines, _ = onelayer(check.rpartition("_")[2], BASE, *T, "--learning-rate", rate)
        assert code == 1 and lines == [f"onelayer: the rate is {read}"]


def test_an_algorithm_in_a_file_that_is_no_text_is_one_line(onelayer, tmp_path):
    (tmp_path / "own.yaml").write_text(f"model: {BASE}\ntask: arithmetic\nalgorithm: [grpo]\n")
    code, lines, _ = onelayer("train", "--config", tmp_path / "own.yaml", *FAST, "--out", tmp_path / "run")
    assert code == 1 and len(lines) == 1 and "algorithm: expected text, got ['grpo']" in lines[0], lines


def test_an_output_that_is_not_a_run_is_not_touched(onelayer, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    code, lines, _ = onelayer("train", BASE, *T, "--layer", "5", "--out", tmp_path / "theirs")
    assert code == 1 and len(lines) == 1 and "holds other files" in lines[0]
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


@pytest.fixture
def prompts(tmp_path):
    """Options for 16 prompts with a reward that notes what it graded."""
    (tmp_path / "noting.py").write_text(
        "graded = []\n"
        "def reward(prompts, completions, **kwargs):\n"
        "    graded.extend(prompts)\n"
        f"    open({str(tmp_path / 'graded')!r}, 'a').write(''.join(prompt + '\\n' for prompt in prompts))\n"
        "    return [float('1' in completion) for completion in completions]\n"
    )
    rows = [{"prompt": f"A{i:03d}+001="} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", tmp_path / "train.jsonl", "--reward", f"{tmp_path / 'noting.py'}:reward"]


EPOCHS = [
    ("grpo", "2", 8, 2 * 8),  # 32 completions a step, 8 of a prompt
    pytest.param("grpo", "0.5", 2, None, marks=pytest.mark.more),
    pytest.param("rloo", "1", 4, 8, marks=pytest.mark.more),
    pytest.param("online_dpo", "2", 4, 2 * 2, marks=pytest.mark.more),  # 8 prompts a step, 2 completions of each
    pytest.param("a2po", "3", 6, None, marks=pytest.mark.more),
]


@pytest.mark.more
@pytest.mark.parametrize(("algorithm", "epochs", "steps", "times"), EPOCHS)
def test_epochs_that_are_set_decide(train, prompts, tmp_path, algorithm, epochs, steps, times):
    options = ["--algorithm", algorithm, "--set", f"num_train_epochs={epochs}", "--layer", "5", *FAST[2:]]
    options += ["--set", f"{'max_new_tokens' if algorithm == 'online_dpo' else 'max_completion_length'}=8"]
    size = "per_device_train_batch_size=8" if algorithm in ("online_dpo", "a2po") else FAST[1]
    options += ["--set", "filter_all_incorrect=false"] if algorithm == "a2po" else []
    run, _ = train("train", BASE, *prompts, *options, "--set", size)
    assert run["results"]["steps"] == run["settings"]["config"]["max_steps"] == steps
    assert run["settings"]["config"]["num_train_epochs"] == float(epochs)
    if times is not None:  # every prompt is as often there as any other
        graded = (tmp_path / "graded").read_text().splitlines()
        assert {graded.count(prompt) for prompt in set(graded)} == {times} and len(set(graded)) == 16


ONLINE = ["train", BASE, "--task", "arithmetic", "--layer", "5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "num_train_epochs=1"], "num_train_epochs needs data with an end, and task arithmetic draws prompts"),
        (
            ["--set", "num_train_epochs=1", "--steps", "3"],
            "--steps and --set num_train_epochs both say how long to train",
        ),
        (["--set", "max_steps=3"], "field max_steps is set by --steps"),
        (
            ["--set", "eval_strategy=steps"],
            "field eval_strategy has no effect: a run evaluates nothing; use onelayer eval",
        ),
        (["--set", "per_device_eval_batch_size=3"], "field per_device_eval_batch_size has no effect"),
        (["--set", "do_train=false"], "field do_train has no effect: this command trains"),
        (["--set", "model_init_kwargs={}"], "field model_init_kwargs is set by --revision and --trust-remote-code"),
        (["--set", "trust_remote_code=true"], "field trust_remote_code is set by --trust-remote-code"),
        (["--set", "remove_unused_columns=true"], "field remove_unused_columns would take the columns from the reward"),
        (
            ["--set", 'generation_kwargs={"top_pp": 1}'],
            "sets 'top_pp', which GenerationConfig does not have; did you mean",
        ),
        (
            ["--set", 'generation_kwargs={"stop_strings": ["x"]}'],
            "stop_strings, for which transformers needs the tokenizer",
        ),
        (
            ["--set", 'chat_template_kwargs={"enable_thinking": false}'],
            "sets enable_thinking, but the prompts are plain",
        ),
        (["--sampling", "top_p=0.9"], "--sampling is of --pairs-from-task; --set has the fields that an online"),
        (
            ["--algorithm", "dpo", "--pairs-from-task", "8", "--sampling", "samples=3"],
            "samples is set by --pairs-from-task",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_setting_that_would_have_no_effect_is_refused(onelayer, options, message):
    code, lines, _ = onelayer(*ONLINE, *options, "--out", "run")
    assert code == 1 and len(lines) == 1 and message in lines[0], lines


@pytest.mark.more
def test_the_default_of_a_setting_never_overrides_one_that_was_given(train):
    given = {"logging_steps": 2, "save_steps": 2, "save_total_limit": 1, "disable_tqdm": True, "weight_decay": 0.5}
    given |= {"beta": 0.5, "loss_type": "bnpo", "scale_rewards": "batch", "epsilon": 0.3, "max_completion_length": 4}
    texts = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    run, folder = train(*ON_BLOCK_5, "--steps", "4", *texts)
    config = run["settings"]["config"]
    assert {name: config[name] for name in given if name in config} == {
        name: value for name, value in given.items() if name in config
    }
    assert len(run["results"]["rewards"]) == 2
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.more
def test_a_found_learning_rate_is_that_of_the_resumed_run(train):
    arguments = ["train", BASE, "--task", "arithmetic", "--layer", "5", "--steps", "2"]
    run, folder = train(*arguments)
    written = json.loads((folder / "run.json").read_text()) | {"status": "unfinished"}
    (folder / "run.json").write_text(json.dumps(written))
    resumed, _ = train(*arguments, "--resume")
    assert resumed["settings"] == run["settings"] and resumed["learning_rate"] == run["learning_rate"]


def test_rows_that_raise_are_told_once_and_before_the_model_is_loaded(onelayer, tmp_path, monkeypatch):
    task = tmp_path / "task.py"
    task.write_text("def rows(split, n, seed):\n    raise KeyError('question')\ndef my_reward(**kwargs): return []\n")
    monkeypatch.setattr("peft_onelayer.runs.training.load_causal_lm", None)
    code, lines, _ = onelayer("train", BASE, "--layer", "2", "--task", task, "--steps", "20", "--out", tmp_path / "run")
    assert (code, len(lines)) == (1, 1) and "task.py:2: rows raised KeyError: 'question'" in lines[0], lines
