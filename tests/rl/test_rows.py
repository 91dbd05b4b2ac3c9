"""A row reaches the reward by one route, in training and wherever else completions are graded, with the same values."""

import copy
import datetime

import demo_model
import pytest
import tool_policy
from trl.chat_template_utils import qwen2_5_chat_template

from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rl.rows import reset_by_row
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task

# Arrow would give both dicts both keys, the 2 a point, and the date a time zone's name; it refuses the large number.
VALUES = [
    ({"a": 1, "b": [True, 1, 1.0]}, {"c": None}),
    (2, 2.5),
    (2**70, -1),
    (None, "ä\u2028\x00😀"),
    ([], [[], [1, "two", None]]),
    (datetime.date(2026, 1, 31), datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC)),
    (True, 1),
    ((1, 2), {3}),
    ("", b"\xff"),
]
# Names that TRL, its collators, transformers or datasets take for something of their own.
NAMES = """\
    completion chosen rejected label labels messages image images tools environment text input_ids attention_mask
    answer_input_ids prompt_logps x_logps x_labels x_attention_mask x_pixel_values completion_mask reference
    ref_chosen_logps chat_template_kwargs conversations advantages old_per_token_logps num_items_in_batch""".split()  # noqa: SIM905
PROMPTS = ("A347+085=", "A111+222=")
COLUMNS = {f"value_{i}": pair for i, pair in enumerate(VALUES)} | {
    name: VALUES[i % len(VALUES)] for i, name in enumerate(NAMES)
}
ROWS = [{"prompt": prompt} | {name: pair[i] for name, pair in COLUMNS.items()} for i, prompt in enumerate(PROMPTS)]
SMALL = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "bf16": False, "use_cpu": True}
CONFIGS = {
    "grpo": {"num_generations": 2},
    "rloo": {"num_generations": 2},
    "online_dpo": {"per_device_train_batch_size": 2},
    "a2po": {"num_value_samples": 2, "filter_all_incorrect": False},
    "sdpo": {"num_generations": 2},
    "gmpo": {"num_generations": 2},
}


def same(a, b) -> bool:
    """Equal in value and in type, all the way down; a dict's keys in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Seen:
    """A task whose reward keeps what it was given."""

    def __init__(self, rows, **more):
        self.rows, self.given = rows, []
        self.task = Task("seen", lambda split, n, seed: self.rows, self.reward, 3, **more)

    def reward(self, prompts, completions, **columns):
        own = {name: columns[name] for name in self.rows[0] if name != "prompt"}
        self.given.append((copy.deepcopy(prompts), completions, copy.deepcopy(own)))
        for values in own.values():  # a reward may spoil what it was given
            for value in values:
                if isinstance(value, (list, dict)):
                    value.clear()
        return [float(i % 2) for i in range(len(completions))]

    def check(self):
        """Every completion was graded with the whole row of its prompt."""
        assert self.given
        for prompts, completions, columns in self.given:
            assert len(prompts) == len(completions)
            for i, prompt in enumerate(prompts):
                (row,) = [row for row in self.rows if same(row["prompt"], prompt)]
                for name in row.keys() - {"prompt"}:
                    assert same(columns[name][i], row[name]), name


def run(seen, algorithm, base=demo_model.load):
    model, tokenizer = base()
    recipe = make_recipe(algorithm, seen.task, SMALL | CONFIGS[algorithm])
    train_layer(model, tokenizer, seen.task, 1, steps=2, seed=0, recipe=recipe)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "algorithm",
    [name if name in ("grpo", "online_dpo") else pytest.param(name, marks=pytest.mark.more) for name in CONFIGS],
)
def test_training_gives_the_reward_the_rows_as_they_are(algorithm):
    seen = Seen(copy.deepcopy(ROWS))
    run(seen, algorithm)
    seen.check()
    assert all(same(row, before) for row, before in zip(seen.rows, ROWS, strict=True))


def test_an_evaluation_gives_the_reward_the_rows_as_they_are():
    seen = Seen(copy.deepcopy(ROWS))
    sample_rollouts(*demo_model.load(), seen.task, seen.rows, Sampling(samples=2))
    sample_rollouts(
        *demo_model.load(), seen.task, seen.rows, Sampling(samples=2)
    )  # after the reward has spoilt its own
    seen.check()


CHATS = [
    {"prompt": [{"role": "user", "content": "A347+085="}], "answer": 1},
    {"prompt": [{"role": "system", "content": "", "name": "x"}, {"role": "user", "content": "A1+2="}], "answer": 2.5},
]


def chatty():
    model, tokenizer = demo_model.load()
    # Arrow would give every message a name
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ '1' if 'name' in m }}{% endfor %}"
    return model, tokenizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("a2po", marks=pytest.mark.more)])
def test_messages_keep_their_keys(algorithm):
    seen = Seen(copy.deepcopy(CHATS))
    run(seen, algorithm, chatty)
    seen.check()
    for _, completions, _ in seen.given:  # A2POTrainer itself gives their text
        assert all(completion[0]["role"] == "assistant" for completion in completions)


class Environment:
    """Keeps what it is reset with."""

    given: list = []

    def reset(self, **row):
        self.given.append(copy.deepcopy(row))
        row["value_0"].clear()

    def add(self, n: int) -> str:
        """
        Add to the counter.

        Args:
            n: what to add.
        """
        return str(n)

    def get_reward(self) -> float:
        return 10.0


@pytest.mark.filterwarnings("ignore")
def test_an_environment_is_reset_with_the_row_as_it_is():
    rows = [{**row, "prompt": [{"role": "user", "content": str(i)}]} for i, row in enumerate(copy.deepcopy(ROWS))]
    seen = Seen(rows, environment_factory=Environment)

    def base():
        model, tokenizer = tool_policy.load()
        tokenizer.chat_template = qwen2_5_chat_template
        return model, tokenizer

    Environment.given.clear()
    run(seen, "grpo", base)
    trained = len(Environment.given)
    groups = sample_rollouts(*base(), seen.task, rows, Sampling(samples=1, max_completion_tokens=3))
    assert trained == 8 and len(Environment.given) == trained + 2
    for given in Environment.given:
        assert any(same(given, row) for row in rows)
    # TRL adds what an environment's own get_reward says, and so does every other route
    assert [group[0].reward for group in groups] == [10.0, 11.0]


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (None, "must return one finite number per completion, got None"),
        (float("nan"), "must return one finite number per completion, got nan"),
        (float("-inf"), "must return one finite number per completion, got -inf"),
        (1e30, r"must return numbers of at most 1e\+18 in size, for trainers' float32, got 1e\+30"),
    ],
    ids=str,
)
def test_a_reward_that_a_trainer_would_drop_ends_the_run(score, says):
    """TRL takes None and NaN for no reward, and an infinite one, or one too large to square, for no advantage."""

    def odd_reward(completions, **columns):
        return [0.0] * (len(completions) - 1) + [score]

    odd = Task("odd", lambda split, n, seed: copy.deepcopy(ROWS), odd_reward, 3)
    with pytest.raises(ValueError, match=rf"^the reward odd_reward {says}$"):
        train_layer(
            *demo_model.load(), odd, 5, steps=1, seed=0, recipe=make_recipe("grpo", odd, SMALL | CONFIGS["grpo"])
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("score", "awaited"), [(None, False), (float("nan"), False), (None, True)])
def test_so_does_a_reward_of_an_environments_own(monkeypatch, score, awaited):
    async def later(self):
        return score

    monkeypatch.setattr(Environment, "get_reward", later if awaited else lambda self: score)
    rows = [{**row, "prompt": [{"role": "user", "content": "1"}]} for row in ROWS]
    seen = Seen(copy.deepcopy(rows), environment_factory=Environment)

    def base():
        model, tokenizer = tool_policy.load()
        tokenizer.chat_template = qwen2_5_chat_template
        return model, tokenizer

    says = rf"^Environment\.get_reward must return one finite number, got {score}$"
    with pytest.raises(ValueError, match=says):
        run(seen, "grpo", base)
    with pytest.raises(ValueError, match=says):
        sample_rollouts(*base(), seen.task, copy.deepcopy(rows), Sampling(samples=1, max_completion_tokens=3))


def test_a_reset_that_is_awaited_is_refused_by_its_name(monkeypatch):
    """TRL does not await it."""

    async def later(self, **row):
        return None

    monkeypatch.setattr(Environment, "reset", later)
    with pytest.raises(ValueError, match=r"^Environment\.reset is async, and a trainer does not await it; write def"):
        reset_by_row(Environment, ROWS)()
