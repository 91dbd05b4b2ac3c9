import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import GiGPOConfig, GiGPOTrainer
from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.textworld import (
    FAMILIES,
    TextWorldEnvironment,
    draw_game,
    game_content,
    game_file,
    textworld_reward,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "textworld"
TINY, DEFAULT = FAMILIES["tiny"], FAMILIES[""]


@pytest.fixture(scope="module", autouse=True)
def one_cache_for_all(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def rows(name: str, split: str) -> list[dict]:
    return load_task(name).rows(split, 20, 0)


def started(name: str = "textworld:tiny", index: int = 0) -> TextWorldEnvironment:
    environment = load_task(name).environment_factory()
    environment.reset(**rows(name, "test")[index])
    return environment


def reward_of(environment: TextWorldEnvironment) -> float:
    (reward,) = textworld_reward(prompts=[[]], completions=[[]], environments=[environment], seed=[0], split=["test"])
    return reward


# The task


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"'textworld:huge' is not known; expected 'textworld' or 'textworld:tiny'"):
        load_task("textworld:huge")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'peft-onelayer\[tasks\]'"):
        load_task("textworld")


def test_rows_are_chats_with_the_seed_of_a_game_and_the_same_for_the_same_arguments():
    task = load_task("textworld")
    row, *_ = drawn = task.rows("train", 50, 3)
    assert drawn == task.rows("train", 50, 3) != task.rows("train", 50, 4)
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["split"] == "train" and isinstance(row["seed"], int)
    assert Dataset.from_list(drawn)[0] == row


def test_seeds_of_train_and_test_never_meet_and_those_of_test_are_distinct():
    task = load_task("textworld:tiny")
    test = [row["seed"] for row in task.rows("test", 5000, 0)]
    train = {row["seed"] for seed in range(4) for row in task.rows("train", 5000, seed)}
    assert len(set(test)) == 5000 and not train & set(test)
    with pytest.raises(ValueError, match="split must be"):
        task.rows("valid", 1, 0)


@pytest.mark.more
def test_no_game_of_test_has_the_content_of_a_game_of_train_whatever_the_seeds():
    # From sixty games only, so that without the rule many a game would be in both splits.
    few = cache(lambda number: TINY.make(number))
    family = replace(TINY, make=lambda seed: few(seed % 60))
    contents = {split: {game_content(draw_game(family, split, n)) for n in range(100)} for split in ("train", "test")}
    assert len(contents["train"]) > 30 and len(contents["test"]) > 2
    assert not contents["train"] & contents["test"]


@pytest.mark.more
def test_the_held_out_games_differ_in_content():
    assert len({game_content(draw_game(TINY, "test", row["seed"])) for row in rows("textworld:tiny", "test")}) == 20


@pytest.mark.more
def test_another_process_makes_the_same_game_from_a_seed():
    code = (
        "from peft_onelayer.tasks.textworld import FAMILIES, draw_game, game_content\n"
        "for family in FAMILIES.values(): print(game_content(draw_game(family, 'train', 5)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert printed.stdout.splitlines() == [game_content(draw_game(family, "train", 5)) for family in FAMILIES.values()]


# Making and keeping games


@pytest.mark.more
def test_a_game_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    family = replace(TINY, make=lambda seed: made.append(seed) or TINY.make(seed))
    path = game_file(family, "train", 1)
    draws = len(made)
    assert path.is_relative_to(tmp_path) and game_file(family, "train", 1) == path
    assert len(made) == draws


@pytest.mark.more
@pytest.mark.parametrize("family", [TINY, pytest.param(DEFAULT, marks=pytest.mark.more)])
def test_where_home_cannot_be_written_games_are_made_elsewhere(monkeypatch, tmp_path, family):
    expected = game_file(family, "train", 1).read_bytes()
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))  # not to be made, whoever asks
    path = game_file(family, "train", 1)
    assert game_file(family, "train", 1) == path and len(path.read_bytes()) == len(expected)
    assert os.environ["HOME"] == str(tmp_path / "file" / "home")
    environment = TextWorldEnvironment(family)
    assert environment.reset(split="train", seed=1)


@pytest.mark.more
def test_a_cache_that_is_full_of_games_is_read_where_it_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = game_file(TINY, "train", 1)
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    assert game_file(TINY, "train", 1) == path


@pytest.mark.more
def test_who_makes_a_game_that_another_process_has_finished_meanwhile_takes_that_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make_while_another_process_does(seed):
        other = game_file(TINY, "train", 1)
        other.write_text(other.read_text() + " ")  # to tell it apart
        return TINY.make(seed)

    path = game_file(replace(TINY, make=make_while_another_process_does), "train", 1)
    assert path.read_text().endswith(" ")
    assert [entry.name for entry in path.parent.parent.iterdir()] == ["train-1"]


def test_a_game_that_could_not_be_made_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(seed):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        game_file(replace(TINY, make=fail), "train", 1)
    assert not list(tmp_path.rglob("*train*"))
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        game_file(TINY, "valid", 1)


# Playing


def test_act_is_the_only_tool_and_has_a_schema():
    public = [name for name, value in vars(TextWorldEnvironment).items() if callable(value) and name[0] != "_"]
    assert public == ["reset", "act"]
    schema = get_json_schema(started().act)["function"]
    assert schema["name"] == "act" and schema["parameters"]["required"] == ["command"]
    assert schema["parameters"]["properties"]["command"]["type"] == "string"


@pytest.mark.more
@pytest.mark.parametrize("name", ["textworld:tiny", "textworld"])
def test_a_played_walkthrough_earns_one_and_doing_nothing_earns_zero(name):
    for index in range(10 if name == "textworld:tiny" else 1):
        environment = started(name, index)
        assert reward_of(environment) == environment.score == 0 and not environment.done
        scores = [0.0]
        for command in environment.policy_commands:
            assert not environment.done
            environment.act(command)
            scores.append(environment.score)
        assert environment.won and environment.done and reward_of(environment) == environment.score == 1
        assert environment.rewards == [after - before for before, after in pairwise(scores)]
        assert sum(environment.rewards) == environment.score


@pytest.mark.more
def test_the_prose_is_clean_and_says_what_can_be_done():
    row = rows("textworld", "test")[0]
    environment = load_task("textworld").environment_factory()
    text = environment.reset(**row)
    path = environment.policy_commands
    assert text.startswith("Objective: ") and text.endswith(environment.state)
    assert not all(command in text for command in path), "the objective is not the walkthrough"
    for command in path:
        assert "$$" not in text and "\n>" not in text and "0/1" not in text and "\n\n\n" not in text
        assert text.endswith(f"Possible commands: {'; '.join(environment.admissible_commands)}.")
        text = environment.act(command)
    assert text.endswith("You have won. The game is over.") and "RESTART" not in text


def test_what_the_tiny_player_sees():
    environment = load_task("textworld:tiny").environment_factory()
    first = environment.reset(split="train", seed=5)
    objective, seen = first.split(" . ", 1)
    assert objective == environment.policy_commands[-1]
    assert seen == environment.state
    place, commands = seen.split(" . ")
    assert commands == " , ".join(environment.admissible_commands)
    room = next(fact for fact in environment._now["facts"] if fact.name == "at" and fact.names[0] == "P").names[1]
    assert place.split()[0] == room


@pytest.mark.parametrize("name", ["textworld:tiny", "textworld"])
@pytest.mark.parametrize("command", ["fly", "", "save", "undo", "tw-print state", "look. look", "look\nlook"])
def test_a_command_that_the_game_does_not_know_changes_nothing_and_counts(name, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    environment = started(name)
    state, commands = environment.state, environment.policy_commands
    assert "invalid" in environment.act(command).lower()
    assert environment.state == state and environment.rewards == [0.0]
    assert list(tmp_path.iterdir()) == []
    for command in commands:
        environment.act(command)
    assert environment.won


def test_a_command_that_is_not_possible_now_gets_the_games_own_answer():
    environment = started("textworld")
    state = environment.state
    possible = set(environment._now["possible_admissible_commands"]) - set(environment._now["admissible_commands"])
    command = next(command for command in sorted(possible) if command.startswith("go "))
    assert environment.act(command).startswith("You can't go that way")
    assert environment.state == state


def test_commands_are_read_without_regard_to_case_and_spaces():
    environment = started()
    for command in environment.policy_commands:
        environment.act(f"  {command.upper()} ".replace(" ", "  "))
    assert environment.won


def test_an_episode_ends_when_the_commands_are_used_up():
    environment = started()
    for _ in range(TINY.max_commands - 1):
        assert environment.act("look").endswith(environment.state)
    assert not environment.done
    assert environment.act("look") == "over" == environment.act("look")
    assert environment.done and not environment.won and environment.score == 0
    assert len(environment.rewards) == TINY.max_commands


def test_after_the_end_nothing_more_is_counted():
    environment = started()
    for command in environment.policy_commands:
        last = environment.act(command)
    rewards = environment.rewards
    assert last == "won" == environment.act("look")
    assert environment.rewards == rewards and environment.score == 1 and environment.policy_commands == []


def test_the_same_situation_is_the_same_state_however_it_was_reached():
    environment = started()
    start = environment.state
    away = next(command for command in environment.admissible_commands if command.startswith("go "))
    environment.act(away)
    there = environment.state
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}[away.removeprefix("go ")]
    environment.act(f"go {back}")
    assert environment.state == start != there


def test_an_environment_can_be_reset_often_and_starts_anew_each_time():
    environment = load_task("textworld:tiny").environment_factory()
    first, second = rows("textworld:tiny", "test")[:2]
    observation = environment.reset(**first)
    for command in environment.policy_commands:
        environment.act(command)
    assert environment.reset(**second) != observation
    assert environment.rewards == [] and not environment.done
    assert environment.reset(**first) == observation
    assert started().reset(**first) == observation, "another environment sees the same"


# The small agent


@cache
def small_agent():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "model"), AutoTokenizer.from_pretrained(EXAMPLE / "model")


def test_the_tokenizer_writes_and_reads_tool_calls_and_knows_every_word_of_the_games():
    _, tokenizer = small_agent()
    assert supports_tool_calling(tokenizer) and is_chat_template_prefix_preserving(tokenizer)
    environment = load_task("textworld:tiny").environment_factory()
    for row in rows("textworld:tiny", "train"):
        chat = [{"role": "user", "content": environment.reset(**row)}]
        for command in environment.policy_commands:
            prefix = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            call = {"type": "function", "function": {"name": "act", "arguments": {"command": command}}}
            chat.append({"role": "assistant", "content": "", "tool_calls": [call]})
            ids = tokenizer.apply_chat_template(chat, return_dict=False)
            assert ids[: len(prefix)] == prefix and tokenizer.unk_token_id not in ids
            assert parse_response(tokenizer, ids[len(prefix) :], prefix=prefix) == chat[-1]
            chat.append({"role": "tool", "name": "act", "content": environment.act(command)})
        assert len(tokenizer.apply_chat_template(chat, return_dict=False)) < TINY.max_completion_tokens


@pytest.mark.more
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, GiGPOTrainer])
def test_a_trainer_plays_the_games_and_trains_the_block(trainer_class, tmp_path):
    task = load_task("textworld:tiny")
    model, tokenizer = small_agent()
    seen = []

    def reward(prompts, completions, environments, **kwargs):
        seen.extend(zip(prompts, completions, [env.score for env in environments], strict=True))
        return task.reward(prompts=prompts, completions=completions, environments=environments, **kwargs)

    config_class = {GRPOTrainer: GRPOConfig, GiGPOTrainer: GiGPOConfig}[trainer_class]
    trainer = trainer_class(
        copy.deepcopy(model),
        reward_funcs=reward,
        args=config_class(
            output_dir=str(tmp_path),
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            seed=0,
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=task.max_completion_tokens,
            learning_rate=2e-3,
            beta=0.0,
            top_k=0,
            loss_type="grpo",
        ),
        train_dataset=Dataset.from_list(task.rows("train", 4, 0)),
        processing_class=tokenizer,
        peft_config=SingleLayerConfig(layer=6, task_type="CAUSAL_LM"),
        environment_factory=task.environment_factory,
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(".layers.6." in name for name in changed)

    assert len(seen) == 32
    calls = [message for _, completion, _ in seen for message in completion if message["role"] == "tool"]
    assert len(calls) > 100, "the agent calls the tool several times in a rollout"
    invalid = [message for message in calls if message["content"].startswith(("invalid", "{'error'"))]
    assert len(invalid) < len(calls) / 5, "the agent mostly uses commands of the game"
    for prompt, completion, score in seen:
        assert len(prompt[-1]["content"].split(" . ")) == 3, "the first observation is part of the prompt"
        assert score == (completion[-2]["content"] == "won" if len(completion) > 1 else 0.0)
    assert len({score for _, _, score in seen}) == 2
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["tools/failure_frequency"] for log in logs] == [0.0, 0.0]
    if trainer_class is GiGPOTrainer:
        assert all(log["gigpo/group_size"] > 2 for log in logs), "states repeat across the rollouts of a game"


@pytest.mark.slow
def test_the_study_runs_and_the_success_rises(tmp_path):
    command = [sys.executable, str(EXAMPLE / "study.py"), "--out", str(tmp_path), "--seeds", "0"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    results = json.loads((tmp_path / "results.json").read_text())
    assert {run["algorithm"] for run in results["runs"]} == {"grpo", "gigpo"}
    for run in results["runs"]:
        assert run["gain"] > 3 * run["gain_error"]
    assert (tmp_path / "curves.png").stat().st_size < 200_000
    assert "| gigpo | 0 |" in (tmp_path / "README.md").read_text()
