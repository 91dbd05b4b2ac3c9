"""Completions packed behind their prompt give the scores and gradients of whole rows."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer import utils

from models import EVERY, build, build_architecture
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import packed_prompts, scored_positions, shared_prefix
from peft_onelayer.rl.packing import PackedPrompts, _in_order, pack

pytestmark = pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="this TRL has no fused LM head")
ARGS = SimpleNamespace(torch_compile=False)
WINDOW = {"sliding_window": 4}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}
LENGTHS = [5, 3, 4, 5, 2, 2, 5, 1, 5, 5, 4, 0]


def batch():
    """Twelve shuffled rows of three prompts of 9 tokens, one with padding before it; two completions are equal, and one
    is cut away. (12, 14) int64 each: ids, mask, labels."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 64, (3, 9), generator=generator)
    kept = torch.ones_like(prompts)
    prompts[1, :3] = kept[1, :3] = 0
    completions = torch.randint(3, 64, (12, 5), generator=generator)
    completions[4] = completions[5]
    real = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).long()
    order = torch.randperm(12, generator=generator)
    ids, mask = (
        torch.cat([before.repeat_interleave(4, 0), behind], 1)[order]
        for before, behind in ((prompts, completions * real), (kept, real))
    )
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :9] = -100
    return ids, mask, labels


def scores(model, hooked):
    """Log-probabilities and entropies of a batch, the gradients of both, and what packed it."""
    model = copy.deepcopy(model).train()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    packed = PackedPrompts(model)
    if hooked:
        packed.on_train_begin(ARGS, None, None)
    ids, mask, labels = batch()
    torch.manual_seed(0)
    output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    weights = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(1))
    ((output.log_probs + output.entropy) * weights).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return output.log_probs.detach(), output.entropy.detach(), gradients, packed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Qwen3", {}),
        ("Llama", {}),
        ("Gemma3Text", MIXED),
        ("Mistral", WINDOW),
        ("Qwen3Moe", {"moe_intermediate_size": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scores_and_gradients_are_those_of_whole_rows(family, config, attention):
    model = build(family, **config)
    model.set_attn_implementation(attention)
    *expected, _ = scores(model, hooked=False)
    *found, packed = scores(model, hooked=True)
    assert (packed.packed, packed.whole, packed.off) == (1, 0, None)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=2e-5), (a - b).abs().max()


HEADLESS = {"electra", "llama4_text", "rembert"}  # TRL's fused LM head does not fit them


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(set(EVERY) - HEADLESS))
def test_no_family_is_trained_otherwise(family):
    """Its passes are packed to the same end, or left as they are."""
    model = build_architecture(family).requires_grad_(True)
    *expected, _ = scores(model, hooked=False)
    *found, packed = scores(model, hooked=True)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).norm() <= (1e-4 if packed.packed else 0) * a.norm()


def test_the_families_that_people_train_are_packed():
    for family in ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "mistral", "olmo3", "phi3"):
        assert scores(build_architecture(family).requires_grad_(True), hooked=True)[-1].packed == 1, family


def test_a_packed_column_is_where_it_was_and_sees_its_prompt_and_itself():
    ids, mask, labels = (each.numpy() for each in batch())
    packing = pack(ids, mask, labels, 32)
    length = ids.shape[1]
    for row, column in itertools.product(range(12), range(length)):
        if mask[row, column]:
            at = divmod(packing.places[row, column], packing.slots.shape[1])
            seen = [i for i in range(packing.slots.shape[1]) if packing.slots[at[0], i] in (0, packing.slots[at])]
            seen = [i for i in seen if packing.columns[at[0], i] <= column]
            source = packing.rows[at[0], seen], packing.columns[at[0], seen]
            assert packing.columns[at] == column
            assert ids[source].tolist() == ids[row, : column + 1][mask[row, : column + 1] == 1].tolist()
    assert packing.slots.max() >= 2 and packing.rows.shape[0] < 12
    assert (packing.slots > 0).sum() == sum(LENGTHS) - 2  # the equal completion once
    assert (packing.slots == 0).sum() % (9 + 6 + 9) == 0


def test_the_order_of_the_rows_does_not_matter():
    ids, mask, labels = (each.numpy() for each in batch())
    packed = [pack(ids[order], mask[order], labels[order], 32) for order in (np.arange(12), np.arange(12)[::-1])]
    contents = [
        sorted(zip(ids[order][p.rows, p.columns].tolist(), p.slots.tolist(), strict=True))
        for p, order in zip(packed, (np.arange(12), np.arange(12)[::-1]), strict=True)
    ]
    assert contents[0] == contents[1]


def test_what_would_cost_more_is_left_alone():
    ids, mask, labels = (each.numpy() for each in batch())
    assert pack(ids[:1], mask[:1], labels[:1], 32) is None  # nothing to share
    one = np.ones((2, 1002), np.int64)
    one[1, 2:] = 2
    assert pack(one, np.ones_like(one), np.where(np.arange(1002) < 2, -100, one), 32) is None  # two tokens of 1002
    # So many completions behind one prompt would look at each other in vain: there are several packed rows of it.
    many = np.concatenate([np.ones((64, 50), np.int64), np.arange(64)[:, None] + np.zeros((64, 50), np.int64)], axis=1)
    packing = pack(many, np.ones_like(many), np.where(np.arange(100) < 50, -100, many), 64)
    assert 1 < packing.rows.shape[0] < 64 and packing.share < 0.9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: model.config.update({"attention_dropout": 0.5}), "is random in training"),
        (
            lambda model: setattr(model.config, "layer_types", ["chunked_attention"] * 4),
            "blocks with chunked_attention",
        ),
        (
            lambda model: setattr(model.config, "_attn_implementation_internal", "flash_attention_2"),
            "flash_attention_2",
        ),
    ],
)
def test_where_it_would_be_wrong_it_says_so_and_ends(change, says):
    model = build("Llama").train()
    change(model)
    if says.startswith("is random"):
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.5
    utils.add_fused_lm_head(model)
    packed = PackedPrompts(model)
    packed.on_train_begin(ARGS, None, None)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model.model.forward = lambda **kwargs: (_ for _ in ()).throw(KeyError)  # only what it is given matters
    ids, mask, labels = batch()
    with pytest.warns(UserWarning, match=f"passed with its own prompt: .*{says}"), pytest.raises(KeyError):
        model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert torch.equal(seen[0]["attention_mask"], mask) and packed.packed == 0


def test_a_model_that_reads_more_than_the_mask_is_found_out():
    """One whose blocks mix neighbouring columns, whatever may be attended to."""
    model = build("Llama")
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda hidden, *args, **kwargs: own(hidden + hidden.roll(1, 1), *args, **kwargs)
    *expected, _ = scores(model, hooked=False)
    with pytest.warns(UserWarning, match="differ from those of whole rows by"):
        *found, packed = scores(model, hooked=True)
    assert packed.off is not None
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_longer_rows_are_compared_again():
    """Of a model that packs well as long as rows are short, as one whose attention reaches so many columns back."""
    model = build("Llama").train()
    utils.add_fused_lm_head(model)
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda hidden, *args, **kwargs: own(
        hidden + hidden.roll(1, 1) if hidden.size(1) > 60 else hidden, *args, **kwargs
    )
    packed = PackedPrompts(model)
    packed.on_train_begin(ARGS, None, None)
    ids, mask, labels = batch()
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert packed.packed == 2 and packed.off is None
    more = torch.full((12, 40), 5)  # before every prompt
    longer = [torch.cat([a, b], 1) for a, b in ((more, ids), (more * 0 + 1, mask), (more * 0 - 100, labels))]
    with pytest.warns(UserWarning, match="differ from those of whole rows by"):
        model(**dict(zip(("input_ids", "attention_mask", "labels"), longer, strict=True)), fused_lm_head=True)
    assert packed.packed == 2 and packed.off is not None


def test_rows_that_are_only_made_shorter_are_compared_too():
    """Two of three rows have one prompt, and so much padding behind them that each alone is the cheapest way."""
    model = build("Llama").train()
    utils.add_fused_lm_head(model)
    packed = PackedPrompts(model)
    packed.on_train_begin(ARGS, None, None)
    ids = torch.randint(3, 64, (3, 120), generator=torch.Generator().manual_seed(0))
    ids[1, :4] = ids[0, :4]
    mask = (torch.arange(120) < 80).long().expand(3, -1)
    labels = ids.masked_fill((mask == 0) | (torch.arange(120) < 4), -100)
    assert (pack(ids.numpy(), mask.numpy(), labels.numpy(), 32).slots.max(axis=1) == 1).all()
    found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    assert (packed.packed, packed.off) == (1, None)
    packed.remove()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    assert torch.allclose(found, expected, atol=2e-5)


def test_rows_of_images_are_left_in_the_order_that_they_have():
    """What has not one entry a row cannot be put in order with the rows."""
    rows = [{"completion_ids": torch.tensor([[i]]), "onelayer_row": torch.tensor([1 - i])} for i in range(2)]
    passes = [row | {"pixel_values": torch.zeros(3, 2)} for row in rows]
    assert [each["completion_ids"].item() for each in _in_order(copy.deepcopy(passes))] == [0, 1]
    found = _in_order([row | {"mask": None, "items": torch.tensor(7), "texts": [f"{i}"]} for i, row in enumerate(rows)])
    assert [each["completion_ids"].item() for each in found] == [1, 0] and [each["texts"] for each in found] == [
        ["1"],
        ["0"],
    ]
    assert all(each["mask"] is None and each["items"] == 7 and "onelayer_row" not in each for each in found)


def grpo(tokenizer, folder, *, packs, **settings):
    settings = {"num_generations": 4, "max_completion_length": 5, "learning_rate": 1e-3, "max_steps": 2} | settings
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    trainer = GRPOTrainer(
        build(),
        reward_funcs=lambda completions, **columns: [float(len(set(text)) % 3) for text in completions],
        args=GRPOConfig(str(folder), **settings),
        train_dataset=Dataset.from_list([{"prompt": f"{c}bcdefghij"} for c in "klmnopqr"]),
        processing_class=tokenizer,
        peft_config=SingleLayerConfig(layer=2, task_type="CAUSAL_LM"),
    )
    prefix = shared_prefix(trainer)
    packed = packed_prompts(trainer) if packs else None
    scored_positions(trainer)
    trainer.train()
    return {name: p.detach() for name, p in trainer.model.named_parameters() if ".default." in name}, packed, prefix


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.more), 0.1])
def test_a_trainer_trains_the_same_in_fewer_passes(tokenizer, tmp_path, beta):
    """Eight passes a step of two rows each: TRL's shuffle is undone, so that they share prompts, and with a reference
    the policy's passes start above the frozen blocks."""
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "beta": beta}
    expected, _, _ = grpo(tokenizer, tmp_path, packs=False, **given)
    found, packed, prefix = grpo(tokenizer, tmp_path, packs=True, **given)
    assert packed.whole == 0 and packed.packed == 16 * (2 if beta else 1) and packed.off is None
    assert prefix.started > 12 if beta else prefix.started == 0
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=2e-5), name


def test_several_steps_of_one_generation_keep_their_rows(tokenizer, tmp_path):
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    expected, _, _ = grpo(tokenizer, tmp_path, packs=False, **given)
    found, packed, _ = grpo(tokenizer, tmp_path, packs=True, **given)
    assert packed.packed > 0
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=2e-5), name


def test_pairs_share_their_prompt(tokenizer, tmp_path):
    """DPO, of all parameters, with a reference beside the model."""
    results = []
    for packs in (False, True):
        settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        pairs = [
            {"prompt": f"{c}bcdefghijklmnop", "chosen": "ab" * (1 + i % 3), "rejected": "ba"}
            for i, c in enumerate("klmnopqr")
        ]
        trainer = DPOTrainer(
            build(),
            build(),
            args=DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, **settings),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
        packed = packed_prompts(trainer) if packs else None
        trainer.train()
        results.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    assert packed.packed == 2 and packed.reference.packed == 2
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=2e-4), name
