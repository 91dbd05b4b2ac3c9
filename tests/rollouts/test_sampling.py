"""Rollouts equal those of TRL's GRPOTrainer, token for token, and leave no trace on the model."""

import asyncio
import copy
import dataclasses
from math import inf

import demo_model
import pytest
import tool_policy
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template, qwen3_chat_template

from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, as_chat


class Counter:
    """Reach the target by adding: the environment of the tests."""

    def reset(self, target, **row):
        self.target, self.total = target, 0
        return f" Reach {target}."

    def add(self, n: int) -> str:
        """
        Add to the counter.

        Args:
            n: what to add.
        """
        if n > 3:
            raise ValueError("too much")
        self.total += n
        return f"total {self.total}"

    def _hidden(self):
        raise AssertionError("not a tool")


class AwaitedCounter(Counter):
    """The same, with a tool and a reward of its own that are awaited."""

    async def add(self, n: int) -> str:
        """
        Add to the counter.

        Args:
            n: what to add.
        """
        await asyncio.sleep(0)
        return super().add(n)

    async def get_reward(self):
        await asyncio.sleep(0)
        return self.total / 2


def counter_reward(prompts, completions, target, environments, **kwargs):
    return [-abs(environment.total - goal) / 7 for environment, goal in zip(environments, target, strict=True)]


class AwaitedReset(Counter):
    async def reset(self, target, **row):
        raise AssertionError("a trainer does not await it")


class Parts(Counter):
    def reset(self, target, **row):
        return [{"type": "text", "text": "?"}]


class PartsOfATool(Counter):
    def add(self, n: int) -> list:
        """
        Add to the counter.

        Args:
            n: what to add.
        """
        return [{"type": "text", "text": str(n)}]


def length_reward(prompts, completions, completion_ids, **kwargs):
    return [len(str(completion)) / len(ids) for completion, ids in zip(completions, completion_ids, strict=True)]


COUNTER = Task("counter", lambda split, n, seed: [], counter_reward, 400, environment_factory=Counter)
AWAITED = dataclasses.replace(COUNTER, name="awaited", environment_factory=AwaitedCounter)
TEXT = dataclasses.replace(COUNTER, name="text", reward=length_reward, environment_factory=None)
ROWS = as_chat([{"prompt": "Count" + "!" * i, "target": 1 + i} for i in range(3)])
PLAIN_ROWS = [{"prompt": "Count" + "!" * i + "\n", "target": 1 + i} for i in range(3)]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return tool_policy.load()


class Recorded(GRPOTrainer):
    """TRL's own rollouts, kept where they are made and graded."""

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        _, ids, tool_mask, *_ = generated
        self.tokens = [sum(mask) for mask in tool_mask] if tool_mask else [len(own) for own in ids]
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.recorded = prompts, completions, completion_ids_list, rewards.sum(1).tolist(), self.tokens
        return rewards


def trl_rollouts(model, tokenizer, task, rows, tmp_path, *, greedy, samples, seed, max_completion_tokens):
    trainer = Recorded(
        copy.deepcopy(model),
        reward_funcs=task.reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            per_device_train_batch_size=2 * len(rows),
            per_device_eval_batch_size=len(rows) * samples,
            num_generations=2,
            num_generations_eval=samples,
            max_completion_length=max_completion_tokens,
            temperature=1.0,
            top_k=0,
            generation_kwargs={"do_sample": False} if greedy else None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.copy(tokenizer),
        environment_factory=task.environment_factory,
    )
    trainer.model.eval()
    torch.manual_seed(seed)
    trainer._generate_and_score_completions([row for row in rows for _ in range(samples)])
    return trainer.recorded


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("task", "rows", "limit"),
    [
        pytest.param(COUNTER, ROWS, 300, id="environment", marks=pytest.mark.more),
        pytest.param(COUNTER, ROWS, 130, id="environment, short of room"),
        pytest.param(AWAITED, ROWS, 130, id="awaited"),
        pytest.param(TEXT, ROWS, 40, id="chat"),
        pytest.param(TEXT, PLAIN_ROWS, 40, id="plain"),
    ],
)
@pytest.mark.parametrize(
    ("greedy", "template"),
    [
        pytest.param(False, qwen2_5_chat_template, id="sampled-qwen2.5"),
        pytest.param(True, qwen3_chat_template, id="greedy-qwen3"),
        pytest.param(True, qwen2_5_chat_template, id="greedy-qwen2.5", marks=pytest.mark.more),
        pytest.param(False, qwen3_chat_template, id="sampled-qwen3", marks=pytest.mark.more),
    ],
)
def test_rollouts_are_those_of_trl(model_and_tokenizer, tmp_path, task, rows, limit, greedy, template):
    model, tokenizer = model_and_tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    settings = {"greedy": greedy, "samples": 1 if greedy else 6, "seed": 3, "max_completion_tokens": limit}
    prompts, completions, ids, rewards, tokens = trl_rollouts(model, tokenizer, task, rows, tmp_path, **settings)
    graded_ids = []

    def reward(completion_ids, **kwargs):
        graded_ids.extend(completion_ids)
        return task.reward(completion_ids=completion_ids, **kwargs)

    groups = sample_rollouts(model, tokenizer, dataclasses.replace(task, reward=reward), rows, Sampling(**settings))
    ours = [rollout for group in groups for rollout in group]
    assert [len(group) for group in groups] == [settings["samples"]] * len(rows)
    assert graded_ids == ids
    assert [rollout.completion for rollout in ours] == completions
    assert [rollout.prompt for rollout in ours] == prompts
    assert [rollout.reward for rollout in ours] == pytest.approx(rewards, rel=1e-6)
    assert [rollout.tokens for rollout in ours] == tokens
    assert [rollout.ended for rollout in ours] == [own[-1] == tokenizer.eos_token_id for own in ids]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("what", ["completion", "context"])
def test_where_there_is_no_room_for_an_answer(model_and_tokenizer, tmp_path, what, missing):
    """Room for exactly the first call and its result, or for one token less, in the completion or in the context."""
    model, tokenizer = copy.deepcopy(model_and_tokenizer)
    tokenizer.chat_template = qwen2_5_chat_template
    settings = {"greedy": True, "samples": 1, "seed": 0}
    ((rollout,),) = sample_rollouts(
        model, tokenizer, COUNTER, ROWS[:1], Sampling(max_completion_tokens=300, **settings)
    )
    rendering = {"tools": [Counter().add], "add_generation_prompt": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(rollout.prompt, **rendering)
    one_turn = tokenizer.apply_chat_template(rollout.prompt + rollout.completion[:2], **rendering)
    limit = 300
    if what == "completion":
        limit = len(one_turn) - len(prompt) - missing
    else:
        model.config.max_position_embeddings = len(one_turn) + 1 - missing
    _, (theirs,), _, _, (tokens,) = trl_rollouts(
        model, tokenizer, COUNTER, ROWS[:1], tmp_path, max_completion_tokens=limit, **settings
    )
    ((ours,),) = sample_rollouts(model, tokenizer, COUNTER, ROWS[:1], Sampling(max_completion_tokens=limit, **settings))
    assert (ours.completion, ours.tokens) == (theirs, tokens)
    assert len(ours.completion) == (1 if missing else 2 if what == "completion" else 3)


@pytest.fixture
def with_tools(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model, tokenizer = copy.deepcopy(model), copy.copy(tokenizer)
    tokenizer.chat_template = qwen3_chat_template
    return model, tokenizer


def test_the_toy_policy_does_what_the_comparison_needs(with_tools):
    """Several turns, several calls in one, tools that fail or do not exist, calls that cannot be read."""
    groups = sample_rollouts(*with_tools, COUNTER, ROWS, Sampling(samples=10, max_completion_tokens=300))
    completions = [rollout.completion for group in groups for rollout in group]
    messages = [message for completion in completions for message in completion]
    results = {message["content"] for message in messages if message["role"] == "tool"}
    assert {"total 1", "{'error': 'too much'}", "{'error': 'Tool subtract not found.'}"} <= results
    assert max(len(message.get("tool_calls", ())) for message in messages) > 1
    assert max(len(completion) for completion in completions) > 5 and min(map(len, completions)) == 1
    assert any(message["role"] == "assistant" and '"n": x' in message["content"] for message in messages)
    assert len({rollout.reward for rollout in groups[2]}) > 2


@pytest.mark.more
def test_the_environment_says_what_it_did_to_its_own_rollout(with_tools):
    groups = sample_rollouts(*with_tools, COUNTER, ROWS, Sampling(samples=8, batch_size=5, max_completion_tokens=300))
    for row, group in zip(ROWS, groups, strict=True):
        for rollout in group:
            assert rollout.prompt[-1]["content"] == row["prompt"][-1]["content"] + f" Reach {row['target']}."
            calls = [
                call["function"]["arguments"]["n"]
                for message in rollout.completion
                for call in message.get("tool_calls", ())
                if call["function"]["name"] == "add"
            ]
            added = [message["content"] for message in rollout.completion if message["role"] == "tool"]
            totals = [int(result.removeprefix("total ")) for result in added if result.startswith("total")]
            assert totals == sorted(totals) and len(totals) <= len(calls)
            last = rollout.completion[-1]
            if totals and last["role"] == "assistant" and not last.get("tool_calls"):
                assert rollout.reward == pytest.approx(-abs(totals[-1] - row["target"]) / 7)


@pytest.mark.more
def test_an_environment_is_evaluated_without_a_trace(with_tools):
    from peft import get_peft_model

    from peft_onelayer import SingleLayerConfig

    model, tokenizer = with_tools
    model.train()
    model.model.layers[1].eval()
    before = copy.deepcopy((ROWS, tokenizer.response_template, tokenizer.chat_template, tokenizer.pad_token))
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state(), [module.training for module in model.modules()], set(vars(model))
    settings = {"samples": 4, "max_completion_tokens": 200}
    evaluation = evaluate(model, tokenizer, COUNTER, ROWS, Sampling(**settings))
    assert (ROWS, tokenizer.response_template, tokenizer.chat_template, tokenizer.pad_token) == before
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    assert torch.equal(torch.get_rng_state(), state[0])
    assert ([module.training for module in model.modules()], set(vars(model))) == state[1:]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert len(set(evaluation.problems)) == len(ROWS) and len(set(evaluation.scores)) > 1

    adapted = get_peft_model(model, SingleLayerConfig(layer=1))
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert evaluate(adapted, tokenizer, COUNTER, ROWS, Sampling(**settings)) == evaluation
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trained
    assert adapted.is_gradient_checkpointing


def test_greedy_rollouts_do_not_depend_on_the_batch(with_tools):
    settings = {"greedy": True, "max_completion_tokens": 200}
    together = sample_rollouts(*with_tools, COUNTER, ROWS, Sampling(**settings))
    seen = []
    alone = sample_rollouts(*with_tools, COUNTER, ROWS, Sampling(batch_size=1, **settings), on_progress=seen.append)
    assert alone == together and seen == [1, 2, 3]


def test_a_chat_prompt_is_completed_as_a_chat(with_tools):
    model, tokenizer = with_tools
    plain = [{"prompt": "Count", "target": 1}]
    chat = as_chat(plain)
    assert chat == [{"prompt": [{"role": "user", "content": "Count"}], "target": 1}] and as_chat(chat) == chat
    assert plain == [{"prompt": "Count", "target": 1}]
    ((rollout,),) = sample_rollouts(model, tokenizer, TEXT, chat, Sampling(greedy=True, max_completion_tokens=20))
    ((message),) = rollout.completion
    rendered = tokenizer.apply_chat_template(chat[0]["prompt"], add_generation_prompt=True, tokenize=False)
    as_text = [{**plain[0], "prompt": rendered}]
    ((same,),) = sample_rollouts(model, tokenizer, TEXT, as_text, Sampling(greedy=True, max_completion_tokens=20))
    assert message == {"role": "assistant", "content": same.completion} and len(same.completion) > 3


def test_a_score_of_a_problem_is_paired_by_its_whole_row(with_tools):
    rows = [{"prompt": ROWS[0]["prompt"], "target": target} for target in (1, 2)]
    evaluation = evaluate(*with_tools, COUNTER, rows, Sampling(greedy=True, max_completion_tokens=100))
    assert len(set(evaluation.problems)) == 2


@pytest.mark.parametrize(
    ("task", "rows", "template", "message"),
    [
        (COUNTER, ROWS, "{{ messages[-1]['content'] }}", "task counter plays through tool calls"),
        (COUNTER, PLAIN_ROWS, qwen3_chat_template, "needs chat prompts"),
        (
            dataclasses.replace(COUNTER, environment_factory=AwaitedReset),
            ROWS,
            qwen3_chat_template,
            r"AwaitedReset\.reset is async, .* write def reset",
        ),
        (
            dataclasses.replace(COUNTER, environment_factory=Parts),
            ROWS,
            qwen3_chat_template,
            r"Parts\.reset gave a list, .*; return text",
        ),
        (
            dataclasses.replace(COUNTER, environment_factory=PartsOfATool),
            ROWS,
            qwen3_chat_template,
            "the tool add gave a list, .*; return text",
        ),
        (TEXT, ROWS, None, "no chat template"),
        (TEXT, [{"prompt": "a" * 2048, "target": 1}], None, "a prompt of 2048 tokens .* context of 2048 tokens"),
        (TEXT, [{"prompt": "a" * 1649, "target": 1}], None, "completion of up to 400 do not fit"),
        (COUNTER, as_chat([{"prompt": "a" * 2048, "target": 1}]), qwen3_chat_template, "do not fit"),
        (
            dataclasses.replace(TEXT, reward=lambda **kwargs: [1.0]),
            PLAIN_ROWS,
            None,
            "a list of 3 numbers, one per .*; got 1",
        ),
        (dataclasses.replace(TEXT, reward=lambda **kwargs: [1.0, None, 0]), PLAIN_ROWS, None, "finite .*, got None"),
        (dataclasses.replace(TEXT, reward=lambda **kwargs: [1.0, inf, 0]), PLAIN_ROWS, None, "finite .*, got inf"),
        (TEXT, [], None, "at least one row"),
    ],
)
def test_what_cannot_be_played_is_refused(model_and_tokenizer, task, rows, template, message):
    model, tokenizer = model_and_tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as raised:
        sample_rollouts(model, tokenizer, task, rows, Sampling(greedy=True))
    assert "\n" not in str(raised.value)


def test_a_prompt_and_completion_may_fill_the_context(model_and_tokenizer):
    rows = [{"prompt": "a" * 2044, "target": 1}]
    ((rollout,),) = sample_rollouts(*model_and_tokenizer, TEXT, rows, Sampling(greedy=True, max_completion_tokens=4))
    assert rollout.tokens <= 4


def test_a_completion_that_went_on_to_another_problem_has_ended_and_counts_up_to_there():
    model, tokenizer = demo_model.load()
    seen = []
    task = Task("sums", lambda *_: [], lambda completions, **_: seen.append(completions) or [1.0], 3)
    (whole,) = sample_rollouts(model, tokenizer, task, [{"prompt": "A347+485="}], Sampling(greedy=True))[0]
    assert whole.completion == "083" and not whole.ended
    cut = dataclasses.replace(task, end="83")
    (cut,) = sample_rollouts(model, tokenizer, cut, [{"prompt": "A347+485="}], Sampling(greedy=True))[0]
    assert (cut.completion, cut.ended, cut.ids, cut.tokens) == ("0", True, whole.ids, 3)
    assert seen == [["083"], ["083"]]  # what `shaped` makes of the reward sees less
    for is_over in (lambda text: "8" in text, lambda text: "9" in text):
        over = dataclasses.replace(task, is_over=is_over)
        (same,) = sample_rollouts(model, tokenizer, over, [{"prompt": "A347+485="}], Sampling(greedy=True))[0]
        assert (same.completion, same.ended) == ("083", is_over("083"))
