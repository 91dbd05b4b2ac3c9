"""Every name of `--algorithm`: its settings as TRL's configuration holds them, and one block trained with it."""

import ast
import copy
import dataclasses
import re
import typing
from pathlib import Path

import demo_model
import pytest
import torch
import trl
from corridor import TOKENIZER, Babble, Corridor
from corridor import reward as corridor_reward
from transformers import Trainer, TrainingArguments

from models import build
from peft_onelayer.rl import GiGPOTrainer, settings
from peft_onelayer.rl.algorithms import ALGORITHMS, NOT_OFFERED, Algorithm, load_algorithm
from peft_onelayer.rl.preferences import FORMATS, pairs_from_rollouts
from peft_onelayer.rl.recipe import Recipe, config_from_text, make_recipe
from peft_onelayer.rl.training import train_rows
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, load_task

BLOCK = 5
TRL = Path(trl.__file__).parent
NO_TRAINERS_OF_THEIR_OWN = {
    "trainer.base_trainer._BaseTrainer": "the base class",
    "experimental.kto.KTOTrainer": "the old name of trl.KTOTrainer",
    "experimental.distillation.DistillationTrainer": "the old name of trl.DistillationTrainer",
}


def names(data: str | None = None) -> list[str]:
    return [name for name, algorithm in ALGORITHMS.items() if data in (None, algorithm.data)]


def defaults(tmp_path, algorithm: Algorithm) -> dict:
    """What a run sets: two steps of 16 completions of the demo model's arithmetic."""
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "seed": 0,
    }
    if algorithm.completion_length:
        values[algorithm.completion_length] = 5
    if algorithm.group_size:
        values[algorithm.group_size] = 4
    return values


def make(algorithm: Algorithm, values: dict, own_options: dict | None = None, **texts: str) -> Recipe:
    """The recipe of a run that sets `values`, and of a user who sets `texts`."""
    given = config_from_text(algorithm, [f"{name}={text}" for name, text in texts.items()], own_options or {})
    return Recipe(algorithm, {**values, **algorithm.settings, **given}, given=given)


def path_of(trainer: type) -> str:
    return f"{trainer.__module__}.{trainer.__name__}".removeprefix("trl.")


def test_no_trainer_of_trl_is_left_out():
    """Read from the source, because some modules of trl.experimental need packages that are not installed."""
    found = set()
    for path in [*TRL.glob("trainer/*.py"), *TRL.glob("experimental/**/*.py")]:
        module = ".".join(path.relative_to(TRL).with_suffix("").parts).removesuffix(".__init__")
        classes = (node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
        found |= {f"{module}.{name}" for name in classes if name.endswith("Trainer")}
    offered = {path_of(algorithm.trainer_class(adapter=False)) for algorithm in ALGORITHMS.values()}
    refused = {path_of(dataclasses.replace(ALGORITHMS["dpo"], trainer=path).trainer_class()) for path in NOT_OFFERED}
    assert not offered & refused
    assert offered - {path_of(GiGPOTrainer)} | refused == found - NO_TRAINERS_OF_THEIR_OWN.keys()
    assert found > NO_TRAINERS_OF_THEIR_OWN.keys()


@pytest.mark.parametrize("trainer", ["grpo", "dpo", "kto"])
def test_no_loss_of_trl_is_left_out(trainer):
    """The strings that the trainer's source compares its loss type with."""
    tree = ast.parse((TRL / "trainer" / f"{trainer}_trainer.py").read_text())
    compared = (node for node in ast.walk(tree) if isinstance(node, ast.Compare))
    on_loss = (node for node in compared if re.fullmatch(r"(\w+\.)?loss_type", ast.unparse(node.left)))
    constants = (part for node in on_loss for value in node.comparators for part in ast.walk(value))
    losses = {part.value for part in constants if isinstance(part, ast.Constant)}
    same_trainer = [a.settings for a in ALGORITHMS.values() if a.trainer == ALGORITHMS[trainer].trainer]
    offered = [s["loss_type"] if isinstance(s["loss_type"], list) else [s["loss_type"]] for s in same_trainer]
    assert {loss for some in offered for loss in some} == losses
    if trainer == "grpo":
        assert set(typing.get_args(settings._GRPO["loss_type"])) == losses


@pytest.mark.parametrize("name", names())
def test_the_configuration_holds_the_settings(tmp_path, name):
    algorithm = load_algorithm(name)
    config = make(algorithm, defaults(tmp_path, algorithm)).config()
    assert isinstance(config, TrainingArguments) and type(config) is algorithm.config_class
    settings = dict(algorithm.settings)
    if name == "gigpo":
        assert settings["scale_rewards"] is None  # the configuration makes it follow `normalize`
        settings["scale_rewards"] = "group"
    assert {field: getattr(config, field) for field in settings} == settings
    assert config.max_steps == 2 and config.learning_rate == 1e-2
    trainer = algorithm.trainer_class()
    assert issubclass(trainer, Trainer) and issubclass(trainer, algorithm.trainer_class(adapter=False))
    assert algorithm.name == name and re.fullmatch(r"\d{4}\.\d{5}", algorithm.source)
    assert algorithm.online == (algorithm.data not in FORMATS)


@pytest.mark.parametrize(
    "name", ["grpo", "gigpo", "rloo", "a2po", "online_dpo", "sdpo", "sdft", "dpo", "kto", "cpo", "orpo", "tpo"]
)
def test_the_source_is_the_paper_that_the_trainer_names(name):
    assert ALGORITHMS[name].trainer_class()._paper["id"] == ALGORITHMS[name].source


# As the papers have them; with the settings of the issue's own algorithms spelled out once more.
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grpo", {"loss_type": "grpo", "scale_rewards": "group", "epsilon": 0.2, "epsilon_high": None, "beta": 0.001}),
        ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.2, "beta": 0.0}),
        ("dapo", {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0}),
        ("dapo", {"mask_truncated_completions": True, "scale_rewards": "group"}),
        ("gigpo", {"loss_type": "grpo", "gamma": 0.95, "omega": 1.0, "normalize": "std", "scale_rewards": "group"}),
        ("gigpo", {"epsilon": 0.2, "beta": 0.001, "use_bias_correction_kl": False}),
        ("gspo", {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.0}),
        ("gmpo", {"epsilon": 0.4, "beta": 0.0}),
        ("rloo", {"beta": 0.03, "normalize_advantages": False}),
        ("dpo", {"loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0}),
        ("kto", {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 1.375}),
    ],
)
def test_settings_of_the_papers(tmp_path, name, values):
    config = make(ALGORITHMS[name], defaults(tmp_path, ALGORITHMS[name])).config()
    assert {field: getattr(config, field) for field in values} == values


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grop", "algorithm 'grop' is not known; did you mean grpo? expected one of grpo, dr_grpo, gigpo, "),
        ("Dr-GRPO", "algorithm 'Dr-GRPO' is not known; did you mean dr_grpo or "),
        ("ppo2000", "algorithm 'ppo2000' is not known; expected one of grpo, "),
        ("", "algorithm '' is not known; expected one of grpo, "),
        ("gkd", "algorithm 'gkd' is not offered: it distills a second, teacher model; use TRL's trl.experimental.gkd."),
        ("async_grpo", "algorithm 'async_grpo' is not offered: it generates with a vLLM server"),
        ("reward", "algorithm 'reward' is not offered: it trains a reward model, not a policy"),
    ],
)
def test_another_name_is_refused(name, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        load_algorithm(name)
    assert "\n" not in str(error.value)


def test_what_is_set_goes_before_the_paper_and_the_paper_before_the_defaults(tmp_path):
    values = {**defaults(tmp_path, ALGORITHMS["grpo"]), "beta": 0.5, "epsilon": 0.5}
    config = make(ALGORITHMS["grpo"], values, {"output_dir": "--out"}, beta="0.04", seed="7").config()
    assert (config.beta, config.epsilon, config.seed) == (0.04, 0.2, 7)


@pytest.mark.parametrize(
    ("given", "updates"),
    [({}, 1), ({"steps_per_generation": 32}, 4), ({"generation_batch_size": 128}, 2)],
    ids=["default", "steps_per_generation", "generation_batch_size"],
)
@pytest.mark.parametrize("prompts", [None, 8])
def test_the_size_of_a_generation_leaves_the_step_as_it_is(tmp_path, given, updates, prompts):
    """gspo's note says 32: the four updates of a generation of arXiv 2507.18071."""
    config = make_recipe("gspo", None, given, prompts=prompts).config(output_dir=str(tmp_path), max_steps=1)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8 * 8
    assert config.generation_batch_size == updates * 8 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": "here"}, "field output_dir is set by --out, not by --set or config"),
        ({"bta": "1"}, "GRPOConfig has no field 'bta'; did you mean beta?"),
        ({"beta": "x"}, "--set beta=x: expected a number"),
        ({"num_generations": "3"}, "GRPOConfig refused num_generations=3: generation_batch_size (16) must be "),
        ({"num_generations": "0"}, "GRPOConfig refused num_generations=0: "),
        ({"num_generations": "none"}, "GRPOConfig refused num_generations=None: "),
        (
            {"auto_find_batch_size": "true", "beta": "0"},
            "GRPOConfig refused auto_find_batch_size=True, beta=0.0: auto_",
        ),
    ],
)
def test_what_trl_or_the_caller_refuses_is_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        make(ALGORITHMS["grpo"], defaults(tmp_path, ALGORITHMS["grpo"]), {"output_dir": "--out"}, **settings).config()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def base():
    return demo_model.load()


@pytest.fixture(scope="module")
def rows(base):
    """Rows of every kind of data, of the demo model's own rollouts."""
    task = load_task("arithmetic")
    problems = task.rows("train", 64, 0)
    kinds = ("preference", "unpaired", "demonstration", "context")
    made = {kind: pairs_from_rollouts(*base, task, problems, kind, Sampling(samples=4)).rows for kind in kinds}
    right = [{**pair, "reference": pair["chosen"]} for pair in made["preference"]]
    return {"task": problems, "triple": right, **made}


def train(base, rows, tmp_path, name: str, layers: int | None = BLOCK, **settings: str):
    """Two steps on a copy of the demo model: what was trained, merged, by name."""
    algorithm = load_algorithm(name)
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    recipe, task = make(algorithm, defaults(tmp_path, algorithm), **settings), load_task("arithmetic")
    result = train_rows(model, tokenizer, recipe, recipe.config(), rows[algorithm.data], layers=layers, task=task)
    assert result.losses and all(torch.tensor(result.losses).isfinite())
    trained = result.model.merge_and_unload() if layers is not None else result.model
    return dict(trained.named_parameters())


SHOWN = ("grpo", "dpo")
SETTINGS = {"sdft": {"distillation_topk": "8"}}  # of the 18 tokens that the demo model knows


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SHOWN else [pytest.mark.more])
        for name in names()
        if not ALGORITHMS[name].needs_environment
    ],
)
def test_the_block_is_trained_and_nothing_else(base, rows, tmp_path, name):
    trained = train(base, rows, tmp_path, name, **SETTINGS.get(name, {}))
    before = dict(base[0].named_parameters())
    assert trained.keys() == before.keys()
    changed = {parameter for parameter in before if not torch.equal(trained[parameter], before[parameter])}
    assert changed == {parameter for parameter in before if parameter.startswith(f"model.layers.{BLOCK}.")}


@pytest.mark.parametrize("name", ["grpo", pytest.param("dpo", marks=pytest.mark.more)])
def test_the_same_seed_gives_the_same_weights(base, rows, tmp_path, name):
    one, two = (train(base, rows, tmp_path / str(i), name) for i in range(2))
    assert all(torch.equal(one[parameter], two[parameter]) for parameter in one)
    other = train(base, rows, tmp_path / "other", name, seed="1")
    assert not all(torch.equal(one[parameter], other[parameter]) for parameter in one)


@pytest.mark.parametrize("name", ["grpo", pytest.param("dr_grpo", marks=pytest.mark.more)])
def test_everything_is_trained_where_no_layer_is_named(base, rows, tmp_path, name):
    trained = train(base, rows, tmp_path, name, layers=None)
    assert not any(torch.equal(trained[name], parameter) for name, parameter in base[0].named_parameters())


def test_gigpo_trains_the_block_in_an_environment(tmp_path):
    model = build(num_layers=3, max_position_embeddings=512)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.generate = Babble(0)
    algorithm = load_algorithm("gigpo")
    values = {**defaults(tmp_path, algorithm), "max_completion_length": 60}
    prompts = [{"prompt": [{"role": "user", "content": "go"}], "start": i % 3} for i in range(8)]
    task = Task("corridor", lambda *_: prompts, corridor_reward, 60, Corridor)
    recipe = make(algorithm, values)
    result = train_rows(model, TOKENIZER, recipe, recipe.config(), prompts, layers=1, task=task)
    trained = dict(result.model.merge_and_unload().named_parameters())
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}
