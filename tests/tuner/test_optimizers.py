"""The optimizers that transformers' Trainer offers treat the masters as they treat the parameters of a plain model."""

import importlib.util
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

from models import build
from tuner.helpers import base_name, masters, same, wrap
from tuner.test_families import FAMILIES, SHOWN, of_family
from tuner.test_resume import COMMON, Tokens, assert_equal, state, supervised

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # 8-bit states begin at 4096 elements
FULL_PRECISION = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
# Paging needs a GPU; on a CPU bitsandbytes warns and does without. torchao compiles its step, which takes a while.
QUANTIZED = ["adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit"]
COMPILED = [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw_torch_8bit", "adamw_torch_4bit")]
# Those of packages that are no dependency of ours are tried where they are installed.
ELSEWHERE = {
    "galore_adamw": "galore_torch",
    "galore_adafactor": "galore_torch",
    "apollo_adamw": "apollo_torch",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "stable_adamw": "optimi",
    "grokadamw": "grokadamw",
}
INSTALLED = [
    pytest.param(name, marks=[] if importlib.util.find_spec(package) else pytest.mark.skip(f"{package} is not there"))
    for name, package in ELSEWHERE.items()
]
SHOWN_OPTIMIZERS = {"adamw_torch_fused", "adafactor", "adamw_bnb_8bit"}
# Blocks with an `nn.LayerNorm` whose name does not say so: the Trainer must see its class.
NAMED_OTHERWISE = ["gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "mpt", "falcon"]
GROUPED = {*SHOWN.split(), *NAMED_OTHERWISE}
TRAINED = {"qwen3_next"}  # a composite module with parameters of its own, and norms
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def plain():
    """A model of which only block 2 trains, in full."""
    model = build(**SIZES)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers.2."))
    return model


def low_rank(name: str) -> dict[str, object]:
    """GaLore and APOLLO choose the linear layers by their names. APOLLO's random projections depend on how many frozen
    parameters the model has before each trained one, and a PEFT model has more."""
    chosen = {"optim_target_modules": ["mlp", "q_proj"]}
    if name.startswith("galore"):
        return {**chosen, "optim_args": "rank=4"}
    return {**chosen, "optim_args": "rank=4,proj=svd"} if name.startswith("apollo") else {}


@pytest.mark.parametrize(
    "name",
    [
        *(
            name if name in SHOWN_OPTIMIZERS else pytest.param(name, marks=pytest.mark.more)
            for name in FULL_PRECISION + QUANTIZED
        ),
        *COMPILED,
        *INSTALLED,
    ],
)
def test_equals_full_training_of_that_block(tmp_path, name):
    options = {"optim": name, "weight_decay": 0.1, **low_rank(name)}
    ours, theirs = wrap(build(**SIZES)), plain()
    start = {n: p.detach().clone() for n, p in masters(ours).items()}
    for model in (ours, theirs):
        supervised(tmp_path, model, **options)
    trained = {n: p.detach() for n, p in masters(ours).items()}
    assert same(trained, {n: p.detach() for n, p in theirs.named_parameters() if p.requires_grad})
    assert not any(torch.equal(trained[n], start[n]) for n in start)


def trainer(model, folder, **options) -> Trainer:
    arguments = TrainingArguments(str(folder), weight_decay=0.1, **COMMON | options)
    return Trainer(model=model, args=arguments, train_dataset=Tokens())


def groups(model, folder, **options) -> list[tuple[dict[str, object], set[str]]]:
    """The settings and the parameters' names in the plain model of each group of the Trainer's optimizer."""
    names = {id(p): base_name(n) for n, p in model.named_parameters()}
    made = trainer(model, folder, **options).create_optimizer()
    return [
        ({k: v for k, v in group.items() if k != "params"}, {names[id(p)] for p in group["params"] if p.requires_grad})
        for group in made.param_groups
    ]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in GROUPED else pytest.mark.more) for f in sorted({*FAMILIES})]
)
def test_weight_decay_is_that_of_full_training_in_every_family(tmp_path, family):
    case = of_family(family, 2)
    ours = groups(case.wrap(), tmp_path)
    assert ours == groups(case.full_fine_tuning(), tmp_path)
    assert set.union(*(names for _, names in ours)) == case.trained
    if family in NAMED_OTHERWISE:
        not_decayed = [names for settings, names in ours if settings["weight_decay"] == 0]
        assert any(re.search(r"(ln_1|norm_1|ln_attn|input_layernorm)\.weight$", name) for name in not_decayed[0])


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in TRAINED else pytest.mark.more) for f in sorted({*FAMILIES})]
)
def test_the_trainer_equals_full_training_in_every_family(tmp_path, family):
    case = of_family(family, 2)
    ours, theirs = case.wrap(), case.full_fine_tuning()
    for model in (ours, theirs):
        model.config.use_cache = False
        trainer(model, tmp_path, max_steps=3, per_device_train_batch_size=2, save_strategy="no").train()
    trained = {name: p.detach() for name, p in masters(ours).items()}
    assert same(trained, {n: p.detach() for n, p in theirs.named_parameters() if n in case.trained})
    assert any(not torch.equal(trained[n], case.base.get_parameter(n)) for n in trained)


def test_an_embedding_inside_the_block_keeps_its_class(tmp_path):
    """bitsandbytes keeps the states of embeddings in 32 bits; T5's first block has one, of relative positions."""
    from tuner.test_families import Case, encoder_decoder

    case = Case(encoder_decoder("t5"), 0, pattern="decoder.block", task_type="SEQ_2_SEQ_LM")
    found = {}
    for kind, model in (("ours", case.wrap()), ("theirs", case.full_fine_tuning())):
        owners = {
            base_name(f"{path}.{name}"): type(module)
            for path, module in model.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if p.requires_grad
        }
        found[kind] = owners
    assert found["ours"] == found["theirs"] and torch.nn.Embedding in found["ours"].values()


@pytest.mark.parametrize(
    "name",
    [
        "adamw_torch_fused",
        pytest.param("adafactor", marks=pytest.mark.more),
        *QUANTIZED[:1],
        *(pytest.param(name, marks=pytest.mark.more) for name in QUANTIZED[1:]),
        *COMPILED,
    ],
)
def test_masters_stay_float32_and_the_run_resumes(tmp_path, name):
    def bf16():
        return wrap(build(dtype=torch.bfloat16, **SIZES))

    whole = supervised(tmp_path, bf16(), optim=name)
    assert {p.dtype for p in masters(whole.model).values()} == {torch.float32}
    expected = state(whole)
    quantized = {name.split(".")[0] for name, v in expected["optimizer"].items() if v.dtype == torch.uint8}
    assert len(quantized) == (0 if name in FULL_PRECISION else 5)  # q, o, and the three of the MLP
    resumed = supervised(tmp_path / "resumed", bf16(), str(tmp_path / "checkpoint-2"), optim=name)
    assert_equal(state(resumed), expected)
