"""`GiGPOTrainer`: each step's tokens carry that step's advantage, and with omega = 0 it is `GRPOTrainer`."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from corridor import LEFT, RIGHT, TOKENIZER, Babble, Corridor, replay, reward
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from tuner.helpers import base_weights, masters, same

from models import build
from peft_onelayer import SingleLayerConfig, rl
from peft_onelayer.rl import GiGPOConfig, GiGPOTrainer, gigpo_advantages

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental feature:UserWarning")
PLAIN = {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.001}


class Recorded:
    """Keeps what was generated and scored, before TRL shuffles and splits it."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.recorded = [*getattr(self, "recorded", []), (inputs, output)]
        return output


class GRPO(Recorded, GRPOTrainer):
    pass


class GiGPO(Recorded, GiGPOTrainer):
    pass


def make(tmp_path, trainer=GiGPO, seed=0, environment_factory=Corridor, rows=None, babble=None, model=None, **options):
    arguments = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 60,
        "logging_steps": 1,
        "disable_tqdm": True,
        **options,
    }
    rows = rows or [{"start": i % 3} for i in range(8)]
    prompts = [{"prompt": [{"role": "user", "content": "go"}], **row} for row in rows]
    config = GRPOConfig if trainer is GRPO else GiGPOConfig
    made = trainer(
        model or build(num_layers=3, max_position_embeddings=512),
        reward,
        config(**arguments),
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:2]),
        processing_class=TOKENIZER,
        peft_config=SingleLayerConfig(layer=1, task_type="CAUSAL_LM"),
        environment_factory=environment_factory,
    )
    made.model.generate = babble or Babble(seed)
    return made


def rollouts(output):
    """Per rollout its completion's ids, without the padding."""
    pairs = zip(output["completion_ids"], output["completion_mask"], strict=True)
    return [ids[: int(mask.sum())].tolist() for ids, mask in pairs]


def expected(inputs, output, episode, group_size=4, calls_run=True, **options):
    """(B, T) from the replayed rollouts, the pure function's step term and TRL's episode advantages `episode` (B,)."""
    replayed = [replay(ids, row["start"], calls_run) for ids, row in zip(rollouts(output), inputs, strict=True)]
    states, rewards = [r[0] for r in replayed], [r[1] for r in replayed]
    groups = [i // group_size for i in range(len(inputs))]
    both = gigpo_advantages(rewards, states, groups, **options)
    alone = gigpo_advantages(rewards, states, groups, **{**options, "omega": 0.0})
    result = torch.zeros(output["completion_ids"].shape)
    for i, (_, _, numbers) in enumerate(replayed):
        for position, number in enumerate(numbers):
            if number >= 0:
                result[i, position] = episode[i] + (both[i][number] - alone[i][number])
    return result, replayed


def check(trainer, twin, **options):
    """All that `trainer` recorded, against a `GRPOTrainer` that saw the same rollouts."""
    seen = []
    for (inputs, output), (_, plain) in zip(trainer.recorded, twin.recorded, strict=True):
        assert torch.equal(output["completion_ids"], plain["completion_ids"])
        assert plain["advantages"].dim() == 1 and output["advantages"].shape == output["completion_ids"].shape
        wanted, replayed = expected(inputs, output, plain["advantages"].tolist(), **options)
        torch.testing.assert_close(output["advantages"], wanted, rtol=1e-6, atol=1e-6)
        mask = output["tool_mask"] * output["completion_mask"]
        assert [[n >= 0 for n in r[2]] for r in replayed] == [
            row[: len(r[2])].bool().tolist() for row, r in zip(mask, replayed, strict=True)
        ]
        assert (output["advantages"][mask == 0] == 0).all()
        seen += replayed
    return seen


def generate(trainer, times=1):
    for _ in range(times):
        trainer._generate_and_score_completions([dict(trainer.train_dataset[i // 4]) for i in range(8)])
    return trainer


@pytest.mark.parametrize("normalize", ["std", pytest.param("none", marks=pytest.mark.more)])
def test_each_steps_tokens_carry_its_advantage(tmp_path, normalize):
    options = {"gamma": 0.8, "omega": 0.5, "normalize": normalize}
    trainer = generate(make(tmp_path, **options, max_completion_length=120), times=4)
    scale = {"std": "group", "none": "none"}[normalize]
    twin = generate(make(tmp_path, GRPO, **{**PLAIN, "scale_rewards": scale}, max_completion_length=120), times=4)
    seen = check(trainer, twin, **options)
    turns = [len(states) for states, _, _ in seen]
    assert max(turns) > 6 and 1 in turns  # many, and a rollout that ended at once
    assert any(len(set(states)) < len(states) for states, _, _ in seen)  # a state seen twice
    distinct = [len(set(row[row != 0].tolist())) for _, output in trainer.recorded for row in output["advantages"]]
    assert max(distinct) > 4
    text = " ".join(TOKENIZER.decode(ids) for _, output in trainer.recorded for ids in rollouts(output))
    for case in ("</call><call>", "<call>fly(", "<call>walk(go)", "go<call>"):  # two calls, no such tool, a failed one
        assert case in text


@pytest.mark.parametrize(
    ("length", "steps", "tokens"),
    [
        pytest.param(24, 2, 24, id="nothing is left for the third turn"),
        pytest.param(22, 2, 19, id="the second answer is dropped"),
        pytest.param(27, 3, 27, id="the third turn is cut in its call"),
        pytest.param(30, 3, 30, id="the third turn is cut after its call"),
    ],
)
def test_rollouts_that_grow_too_long(tmp_path, length, steps, tokens):
    """A turn has 7 tokens, an answer 5."""
    trainer, twin = (
        generate(make(tmp_path, kind, babble=Babble(0, [RIGHT, RIGHT, LEFT]), max_completion_length=length, **more), 2)
        for kind, more in ((GiGPO, {}), (GRPO, PLAIN))
    )
    seen = check(trainer, twin)
    assert {(len(states), len(numbers)) for states, _, numbers in seen} == {(steps, tokens)}
    assert all((numbers[-1] == -1) == (length == 24) for _, _, numbers in seen)
    last = [rewards[-1] for _, rewards, _ in seen]
    assert any(last) == (length != 27)  # a walk whose answer was dropped has happened, and counts


def test_truncated_rollouts_are_masked_and_numbered_alike(tmp_path):
    turns = [RIGHT, LEFT, RIGHT, "done"]
    (_, masked), (_, plain) = (
        generate(make(tmp_path, babble=Babble(0, turns), max_completion_length=27, **more)).recorded[0]
        for more in ({"mask_truncated_completions": True}, {})
    )
    assert 0 < masked["completion_mask"].any(dim=1).sum() < 8
    assert torch.equal(masked["advantages"], plain["advantages"])


def test_calls_beyond_the_limit_are_not_run(tmp_path):
    trainer, twin = (
        generate(make(tmp_path, kind, max_tool_calling_iterations=2, **more))
        for kind, more in ((GiGPO, {}), (GRPO, PLAIN))
    )
    seen = check(trainer, twin, calls_run=False)
    assert max(len(states) for states, _, _ in seen) == 3


def test_rollouts_without_a_call(tmp_path):
    """One step each, all in the same state: the step term is the scores' own, and they are all 0."""
    trainer, twin = (generate(make(tmp_path, kind, babble=Babble(0, ["done", "go"]))) for kind in (GiGPO, GRPO))
    (_, output), (_, plain) = trainer.recorded[0], twin.recorded[0]
    assert torch.equal(output["advantages"], plain["advantages"].unsqueeze(1) * output["completion_mask"])


class Backwards(Corridor):
    """Another environment, with another tool, whose states are named alike."""

    def walk(self, direction: str) -> str:
        """
        Walk one cell the other way.

        Args:
            direction: left or right
        """
        return super().walk({"left": "right", "right": "left"}.get(direction, direction))


def test_an_environment_for_each_example(tmp_path):
    """Rows of two kinds: the states and scores come from each rollout's own environment."""
    rows = [{"start": 1, "environment": name} for name in ("there", "back")] * 4
    trainer = generate(make(tmp_path, rows=rows, environment_factory={"there": Corridor, "back": Backwards}))
    ((inputs, output),) = trainer.recorded
    assert [type(e) for e in trainer.environments] == [Corridor] * 4 + [Backwards] * 4
    turned = output["completion_ids"].clone()  # going back by the other direction's name
    words = [TOKENIZER.convert_tokens_to_ids(word) for word in ("left", "right")]
    for old, new in (words, words[::-1]):
        turned[4:][output["completion_ids"][4:] == old] = new
    twin = make(tmp_path, GRPO, rows=rows, environment_factory={"there": Corridor, "back": Backwards}, **PLAIN)
    episode = generate(twin).recorded[0][1]["advantages"].tolist()
    wanted, _ = expected(inputs, {**output, "completion_ids": turned}, episode)
    torch.testing.assert_close(output["advantages"], wanted, rtol=1e-6, atol=1e-6)


class Loud(Corridor):
    """Every other one tells the same state in another way."""

    made = 0

    def __init__(self) -> None:
        self._end = "!" * (Loud.made % 2)
        Loud.made += 1

    @property
    def state(self) -> str:
        return super().state + self._end


def test_similar_states(tmp_path):
    """ "cell0" and "cell0!" share 10 of 11 characters, "cell0" and "cell1" 8 of 10."""
    trainer, twin, exact = (
        generate(make(tmp_path, kind, environment_factory=Loud, **more))
        for kind, more in ((GiGPO, {"anchor_similarity": 0.85}), (GRPO, PLAIN), (GiGPO, {}))
    )
    check(trainer, twin)
    sizes = [each._metrics["train"]["gigpo/group_size"][0] for each in (trainer, exact)]
    assert sizes[0] > 1.3 * sizes[1]


def test_metrics(tmp_path):
    options = {"omega": 0.5, "gamma": 0.9}
    trainer, twin = generate(make(tmp_path, seed=6, **options)), generate(make(tmp_path, GRPO, seed=6, **PLAIN))
    ((inputs, output),) = trainer.recorded
    episode = twin.recorded[0][1]["advantages"]
    _, replayed = expected(inputs, output, episode.tolist(), **options)
    states, rewards = [r[0] for r in replayed], [r[1] for r in replayed]
    groups = [0] * 4 + [1] * 4
    steps = Counter((group, state) for group, row in zip(groups, states, strict=True) for state in row)
    both = gigpo_advantages(rewards, states, groups, gamma=0.9, omega=1.0)
    alone = gigpo_advantages(rewards, states, groups, gamma=0.9, omega=0.0)
    magnitudes = [abs(a - b) for x, y in zip(both, alone, strict=True) for a, b in zip(x, y, strict=True)]
    wanted = {
        "gigpo/singleton_groups": sum(n == 1 for n in steps.values()) / len(steps),
        "gigpo/group_size": sum(steps.values()) / len(steps),
        "gigpo/step_advantage": sum(magnitudes) / len(magnitudes),
        "gigpo/episode_advantage": episode.abs().mean().item(),
    }
    found = {name: values for name, values in trainer._metrics["train"].items() if name.startswith("gigpo/")}
    assert found == {name: [pytest.approx(value, rel=1e-6)] for name, value in wanted.items()}
    assert 0 < wanted["gigpo/singleton_groups"] < 1 and wanted["gigpo/step_advantage"] > 0.1


def test_evaluation_groups_by_its_own_number_of_generations(tmp_path):
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
    trainer, twin = make(tmp_path, **options), make(tmp_path, GRPO, **options, **PLAIN)
    for each in (trainer, twin):
        logs = each.evaluate()
    check(trainer, twin, group_size=2)
    assert "eval_gigpo/group_size" in trainer.state.log_history[-1] and "eval_loss" in logs


class Fed:
    """Keeps what the loss was given."""

    def _compute_loss(self, model, inputs):
        self.fed = [*getattr(self, "fed", []), inputs]
        return super()._compute_loss(model, inputs)


class FedGiGPO(Fed, GiGPO):
    pass


def rows_of(batches, names=("completion_ids", "advantages")):
    return sorted(tuple(row) for b in batches for row in torch.cat([b[name].double() for name in names], 1).tolist())


def test_a_run_trains_one_block_on_its_own_rollouts(tmp_path):
    """Through TRL's shuffling, splitting, reuse and accumulation every row keeps its advantages; block 1 changes."""
    options = {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    options |= {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "steps_per_generation": 4}
    trainer = make(tmp_path, FedGiGPO, **options)
    before = base_weights(trainer.model)
    start = {name: p.detach().clone() for name, p in masters(trainer.model).items()}
    trainer.train()
    assert len(trainer.recorded) == 1 and len(trainer.fed) == 8
    generated = [output for _, output in trainer.recorded]
    assert rows_of(trainer.fed[:4]) == rows_of(trainer.fed[4:]) == rows_of(generated)
    assert same(base_weights(trainer.model), before)
    assert start and not any(torch.equal(p, start[name]) for name, p in masters(trainer.model).items())
    logged = [entry for entry in trainer.state.log_history if "gigpo/step_advantage" in entry]
    assert logged and logged[0]["gigpo/step_advantage"] > 0
    assert "GiGPO" in (tmp_path / "README.md").read_text()


TRAININGS = {
    "defaults": {},
    "reused rollouts": {"loss_type": "dapo", "num_iterations": 2, "gradient_accumulation_steps": 2},
    "off-policy mask": {"loss_type": "bnpo", "off_policy_mask_threshold": 1e-4, "num_iterations": 2},
    "vespo": {"loss_type": "vespo", "num_iterations": 2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2, "scale_rewards": "batch"},
    "sapo": {"loss_type": "sapo", "num_iterations": 2, "scale_rewards": "none"},
    "dr_grpo": {"loss_type": "dr_grpo", "mask_truncated_completions": True, "top_entropy_quantile": 0.5},
    "luspo": {"loss_type": "luspo", "entropy_coef": 0.1},
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if i >= 4 else [pytest.mark.more] if i else [])
        for i, (name, options) in enumerate(TRAININGS.items())
    ],
)
def test_without_step_advantages_it_is_grpo_bit_for_bit(tmp_path, options):
    weights = {}
    for name, trainer, more in (
        ("grpo", GRPO, {**PLAIN, "use_bias_correction_kl": False}),
        ("omega 0", GiGPO, {"omega": 0.0}),
        ("omega 1", GiGPO, {"omega": 1.0}),
    ):
        made = make(tmp_path, trainer, **{**more, **options})
        made.train()
        assert made.state.global_step == 2
        weights[name] = {n: p.detach().clone() for n, p in masters(made.model).items()}
    assert same(weights["grpo"], weights["omega 0"])
    assert not any(torch.equal(p, weights["grpo"][n]) for n, p in weights["omega 1"].items())


class Broken(Corridor):
    score = math.nan


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the reward of step 0 of trajectory 0 is nan, expected a finite number"):
        generate(make(tmp_path, environment_factory=Broken))


class NoScore:
    state = "cell0"

    def reset(self, **row) -> None: ...

    def walk(self, direction: str) -> str:
        """
        Walk.

        Args:
            direction: left or right
        """
        return direction


class StateAsTool(Corridor):
    def state(self) -> str:
        """Say where you are."""
        return "cell0"


class NoTool:
    state, score = "cell0", 0.0

    def reset(self, **row) -> None: ...


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (None, "pass an environment_factory"),
        (NoScore, "NoScore has no property 'score'; GiGPO reads `state`"),
        (StateAsTool, "StateAsTool has no property 'state'"),
        ({"a": Corridor, "b": NoScore}, "NoScore has no property 'score'"),
        (NoTool, "the environment has no public method"),
    ],
)
def test_environments_that_cannot_be_read_are_refused(tmp_path, environment, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, environment_factory=environment)


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args must be a GiGPOConfig, got GRPOConfig"):
        GiGPOTrainer(build(), reward, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), environment_factory=Corridor)
    with pytest.raises(ValueError, match="does not know the turns of a rollout_func"):
        GiGPOTrainer(build(), reward, GiGPOConfig(str(tmp_path), use_cpu=True, bf16=False), rollout_func=print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, r"gamma must be in \[0, 1\], got -0.1"),
        ({"omega": math.nan}, "omega must be a finite number, got nan"),
        ({"normalize": "batch"}, "normalize must be one of std, none, got 'batch'"),
        ({"anchor_similarity": 2.0}, "anchor_similarity must be None or in"),
        ({"importance_sampling_level": "sequence"}, "undoes GiGPO's steps: use 'token'"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GiGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_settings(tmp_path):
    made = {n: GiGPOConfig(str(tmp_path), use_cpu=True, bf16=False, normalize=n) for n in ("std", "none")}
    assert [config.scale_rewards for config in made.values()] == ["group", "none"]
    own = {field.name for field in dataclasses.fields(GiGPOConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    assert own == {"gamma", "omega", "normalize", "anchor_similarity"}  # TRL has none of these names
    assert (made["std"].gamma, made["std"].omega, made["std"].loss_type) == (0.95, 1.0, "grpo")
    assert (made["std"].epsilon, made["std"].epsilon_high, made["std"].delta) == (0.2, None, None)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'GiGP'"):
        rl.GiGP  # noqa: B018
