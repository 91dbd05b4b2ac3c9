"""Rows of one batch that take different adapters: PEFT's `adapter_names`."""

from itertools import product

import pytest
import torch

from models import FAMILIES, build, build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import DTYPES, move, tuner_layers, wrap

SPARSE = ("GptOss", "Qwen3Moe", "Mixtral")
NAMES = ["default", "__base__", "b", "c", "b"]


def adapters(family="Qwen3", dtype=torch.float32, task_type="CAUSAL_LM", scale=0.2, **options):
    """One adapter on block 1, one on blocks 1 and 3, and one on the attention of block 3."""
    model = wrap(build(family, dtype=dtype, **options), layer=1, task_type=task_type)
    model.add_adapter("b", SingleLayerConfig(layer=[1, 3], task_type=task_type))
    model.add_adapter("c", SingleLayerConfig(layer=3, target_modules="self_attn", task_type=task_type))
    for seed, name in enumerate(("default", "b", "c")):
        move(model, name, seed=seed, scale=scale)
    return model.eval()


def with_adapter(model, name, run):
    if name == "__base__":
        with model.disable_adapter():
            return run()
    active = model.active_adapter
    model.set_adapter(name)
    try:
        return run()
    finally:
        model.set_adapter(active)


def batches():
    """By default families of each kind in one dtype, and one in bfloat16."""
    shown = {(family, torch.float32, "CAUSAL_LM") for family in ("Gemma3Text", "GptOss")}
    shown |= {("Qwen3", torch.bfloat16, "CAUSAL_LM")}
    for case in product((*FAMILIES, *SPARSE), DTYPES, ("CAUSAL_LM", None)):
        yield pytest.param(*case, marks=[] if case in shown else [pytest.mark.more])


@pytest.mark.parametrize(("family", "dtype", "task_type"), list(batches()))
@torch.no_grad()
def test_a_mixed_batch_differs_from_separate_ones_as_the_base_does(family, dtype, task_type):
    """Not at all where the processor computes a row alike in every batch. Else by rounding: a row that took another
    adapter differs by a million times as much."""
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = adapters(family, dtype, task_type, scale=0.02, **(sizes if family in SPARSE else {}))
    of_mixing, of_batching = [], []  # differences from rows that ran by themselves, in units of the logits' size
    for seed in range(4):
        tokens = token_batch(len(NAMES), seed=seed)
        mixed = model(input_ids=tokens, adapter_names=NAMES, use_cache=False).logits
        joint = with_adapter(model, "__base__", lambda tokens=tokens: model(input_ids=tokens).logits)
        assert not torch.equal(mixed[0], joint[0])
        for name in dict.fromkeys(NAMES):
            rows = [i for i, n in enumerate(NAMES) if n == name]
            alone = with_adapter(model, name, lambda rows=tokens[rows]: model(input_ids=rows).logits)
            base = with_adapter(model, "__base__", lambda rows=tokens[rows]: model(input_ids=rows).logits)
            of_mixing.append(((mixed[rows] - alone) / alone.std()).double().square().mean())
            of_batching.append(((joint[rows] - base) / base.std()).double().square().mean())
    assert sum(of_mixing) <= 4 * sum(of_batching)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"num_beams": 3}, marks=pytest.mark.more), {"num_beams": 4, "num_return_sequences": 2}],
    ids=str,
)
@torch.no_grad()
def test_generate(options):
    model, tokens = adapters(), token_batch(len(NAMES))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    mixed = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), adapter_names=NAMES, **options)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        alone = with_adapter(model, name, lambda row=row: model.generate(input_ids=tokens[row : row + 1], **options))
        assert torch.equal(mixed[row * each : (row + 1) * each], alone)
    assert not torch.equal(mixed[: 1 * each], mixed[2 * each : 3 * each])


OTHER_MODULES = "run them as one batch for each adapter, or train other modules"


@pytest.mark.parametrize(
    ("family", "targets", "error"),
    [
        ("deepseek_v3", None, None),  # the router returns an entry for each token
        pytest.param("deepseek_v2", None, None, marks=pytest.mark.more),
        pytest.param("glm4_moe", None, None, marks=pytest.mark.more),
        ("llama4_text", None, f"a Llama4TextExperts is given .* {OTHER_MODULES}"),  # tokens, once for each expert
        pytest.param("llama4_text", ["self_attn"], None, marks=pytest.mark.more),
        ("gemma3n_text", None, f"a Gemma3nTextAltUp is given .* {OTHER_MODULES}"),
        pytest.param("gemma3n_text", ["self_attn", "mlp"], None, marks=pytest.mark.more),
        ("jetmoe", None, f"a JetMoeMoA does not return an entry for each row .* {OTHER_MODULES}"),
        ("xlnet", None, "of type xlnet, whose blocks take time before the rows"),
    ],
)
@pytest.mark.parametrize("sizes", [(2, 6), (3, 3)], ids=str)
@torch.no_grad()
def test_a_module_that_is_not_given_rows_is_right_or_refused(family, targets, error, sizes):
    config = {"layer": 1, "task_type": "CAUSAL_LM", "target_modules": targets}
    model = wrap(build_architecture(family), **config)
    model.add_adapter("b", SingleLayerConfig(**config))
    for seed, name in enumerate(("default", "b")):
        move(model.eval(), name, seed=seed, scale=0.2)
    tokens, names = token_batch(*sizes), ["default", "b", "default"][: sizes[0]]
    options = {"use_cache": False}
    if error is not None:
        with pytest.raises((RuntimeError, ValueError), match=error) as raised:
            model(input_ids=tokens, adapter_names=names, **options)
        assert "\n" not in str(raised.value) and all(layer.row_adapters is None for layer in tuner_layers(model))
        return
    mixed = model(input_ids=tokens, adapter_names=names, **options).logits
    for row, name in enumerate(names):
        alone = with_adapter(model, name, lambda row=row: model(input_ids=tokens[row : row + 1], **options).logits)
        assert torch.allclose(mixed[row], alone[0], atol=1e-5)
    assert not torch.allclose(
        mixed[1], with_adapter(model, "default", lambda: model(input_ids=tokens, **options))[0][1]
    )


def test_blocks_without_an_adapter_run_once_for_all_rows():
    model = adapters()
    calls = []
    for index, block in enumerate(model.get_decoder().layers):
        for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.act_fn"):
            module = block.get_submodule(name)
            module = getattr(module, "base_layer", module)
            key = f"{index}.{name}"
            module.register_forward_hook(lambda m, args, out, key=key: calls.append((key, len(args[0]))))
    with torch.no_grad():
        model(input_ids=token_batch(len(NAMES)), adapter_names=NAMES)
    for key, expected in {
        "0.mlp.up_proj": [5],
        "2.mlp.up_proj": [5],
        "1.mlp.up_proj": [1, 2, 2],  # default, none (also "c", which is elsewhere), b
        "3.self_attn.o_proj": [2, 2, 1],
        "3.mlp.up_proj": [3, 2],  # "c" trains the attention only
        "1.mlp.act_fn": [5],  # what has no weights is not wrapped
    }.items():
        assert sorted(n for k, n in calls if k == key) == sorted(expected), key


def test_modules_to_save_are_mixed_too():
    model = wrap(build(), layer=1, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model.add_adapter("b", SingleLayerConfig(layer=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    for name in ("default", "b"):
        move(model, name)
    model.get_base_model().lm_head.modules_to_save["b"].weight.data *= 2
    model.eval()
    tokens, names = token_batch(3), ["b", "default", "__base__"]
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = with_adapter(model, name, lambda row=row: model(input_ids=tokens[row : row + 1]).logits)
            assert torch.allclose(mixed[row], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    "names, message",
    [
        (["default", "b"], "2 names for a batch of 3 rows"),
        (["default"] * 4, "4 names for a batch of 3 rows"),
        (["default", "nobody", "b"], "non-existing adapter.*nobody"),
    ],
)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_wrong_names_are_refused(names, message, task_type):
    model = adapters(task_type=task_type)
    with pytest.raises(ValueError, match=message):
        model(input_ids=token_batch(3), adapter_names=names)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=token_batch(3), adapter_names=names, max_new_tokens=2)
    assert all(layer.row_adapters is None for layer in tuner_layers(model))


def test_training_and_merged_adapters_are_refused():
    model, names = adapters(), ["default", "b", "c"]
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=token_batch(3), adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=token_batch(3), adapter_names=names)
    model.unmerge_adapter()
    model(input_ids=token_batch(3), adapter_names=names)


@pytest.mark.parametrize("num_beams", [pytest.param(1, marks=pytest.mark.more), 3])
@torch.no_grad()
def test_an_attention_with_parameters_of_its_own_splits_its_cache(num_beams):
    model = adapters("GptOss", num_local_experts=4, num_experts_per_tok=2)
    tokens, options = token_batch(len(NAMES)), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options["num_beams"] = num_beams
    for cached in (True, False):
        mixed = model.generate(input_ids=tokens, adapter_names=NAMES, use_cache=cached, **options)
        for row, name in enumerate(NAMES):
            alone = with_adapter(
                model, name, lambda row=row: model.generate(input_ids=tokens[row : row + 1], **options)
            )
            assert torch.equal(mixed[row : row + 1], alone), (cached, name)
    with pytest.raises(ValueError, match=r"cannot be split by rows.*use_cache=False"):
        model.generate(input_ids=tokens, adapter_names=NAMES, cache_implementation="static", **options)
    assert all(layer.row_adapters is None for layer in tuner_layers(model))
