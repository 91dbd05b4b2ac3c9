"""The shared prefix: fewer block forwards, and the weights of the run without it."""

import copy
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from models import build, build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import shared_prefix
from peft_onelayer.rl.prefix import SharedPrefix, draws, not_repeatable
from peft_onelayer.tuner import find_decoder_stack

FEW = "gpt2 gpt_neox mamba2 mixtral qwen3_next gemma4_text xlnet"
MORE = """apertus bloom codegen cohere cohere2 falcon gemma gemma2 gemma3_text gemma3n_text glm4 gpt_bigcode gpt_neo
gptj granite llama mistral mpt olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2 afmoe deepseek_v2 deepseek_v3
gpt_oss olmoe qwen2_moe qwen3_moe falcon_h1 falcon_mamba jamba mamba qwen3_5_text recurrent_gemma ctrl deepseek_v32"""

COMMON = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
COMMON |= {"use_cpu": True, "bf16": False, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "seed": 0}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=1, eos_token_id=2))


def model_of(family):
    if family == "GPT2":
        return gpt2()
    return build(family, **(SLIDING if family == "Gemma3Text" else {}))


def reward(completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def trainer_of(algorithm, model, tokenizer, out, **options):
    if algorithm in ("dpo", "kto"):
        rows = [{"prompt": f"ab{c}", "chosen": f"c{c}d", "rejected": f"ef{c}gh"} for c in "ijklmnop"]
        if algorithm == "kto":
            rows = [
                {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
                for row in rows
                for name in ("chosen", "rejected")
            ]
        kind, config = (DPOTrainer, DPOConfig) if algorithm == "dpo" else (KTOTrainer, KTOConfig)
        given = {}
    else:
        rows = [{"prompt": f"abc{c}"} for c in "ijklmnop"]
        kind, config = (GRPOTrainer, GRPOConfig) if algorithm == "grpo" else (RLOOTrainer, RLOOConfig)
        options = {"max_completion_length": 6, "num_generations": 4, "beta": 0.1} | options
        given = {"reward_funcs": reward}
    args = config(output_dir=str(out), **COMMON | options)
    return kind(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **given)


def block_forwards(model, index):
    """A list whose entry is the number of passes that block `index` ran."""
    count = [0]
    block = model.get_base_model().get_decoder()
    block = (block.layers if hasattr(block, "layers") else block.h)[index]
    first = next(child for child in block.children())
    first.register_forward_pre_hook(lambda module, args: count.__setitem__(0, count[0] + 1))
    return count


def run(algorithm, tokenizer, out, *, share, family="Qwen3", layer=2, base=None, **options):
    model = get_peft_model(base or model_of(family), SingleLayerConfig(layer=layer, task_type="CAUSAL_LM"))
    trainer = trainer_of(algorithm, model, tokenizer, out, **options)
    prefix = shared_prefix(trainer) if share else None
    below = block_forwards(model, 0)
    with warnings.catch_warnings():
        if prefix is not None:
            warnings.filterwarnings("error", message="the frozen blocks are run")
        trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".default." in name}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return prefix, weights, losses, below[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("algorithm", "family", "options"),
    [
        ("dpo", "Qwen3", {}),
        pytest.param("dpo", "Gemma3Text", {"gradient_accumulation_steps": 2}, marks=pytest.mark.more),
        pytest.param("dpo", "GPT2", {}, marks=pytest.mark.more),
        pytest.param("kto", "Llama", {}, marks=pytest.mark.more),
        pytest.param("grpo", "Qwen3", {}, marks=pytest.mark.more),
        ("grpo", "Qwen2", {"num_iterations": 2, "max_steps": 4}),
        ("grpo", "Gemma3Text", {"gradient_accumulation_steps": 2}),
        pytest.param("grpo", "GPT2", {"gradient_checkpointing": False}, marks=pytest.mark.more),
        pytest.param("rloo", "Llama", {}, marks=pytest.mark.more),
    ],
)
def test_the_frozen_blocks_run_once_for_a_row_and_the_weights_are_those_of_the_plain_run(
    algorithm, family, options, tokenizer, tmp_path
):
    runs = [run(algorithm, tokenizer, tmp_path, share=share, family=family, **options) for share in (False, True)]
    (_, plain, plain_losses, plain_below), (prefix, shared, losses, below) = runs
    assert prefix.off is None and prefix.started and not prefix.kept
    assert losses == plain_losses and same(plain, shared)
    assert below == plain_below - prefix.started + 1


def sharing(model, layer=2, **config):
    """A wrapped model whose passes share the prefix, as within a trainer."""
    wrapped = get_peft_model(model, SingleLayerConfig(layer=layer, **config))
    stack = find_decoder_stack(wrapped.get_base_model())
    prefix = SharedPrefix(wrapped.get_base_model(), stack.name, 1)
    prefix.on_train_begin(SimpleNamespace(torch_compile=False), None, None)
    return wrapped, prefix


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options)[0]


@pytest.mark.filterwarnings("ignore:the frozen blocks are run")
@pytest.mark.parametrize(
    "family", [*FEW.split(), *(pytest.param(name, marks=pytest.mark.more) for name in MORE.split())]
)
def test_every_family_either_shares_or_says_why_and_computes_the_same(family):
    bare = build_architecture(family).requires_grad_(False)
    # As in the wrapped model: on some processors torch's convolutions round otherwise where weights need gradients.
    find_decoder_stack(bare).blocks[2].requires_grad_(True)
    ids, other = token_batch(), token_batch(seed=1)
    expected = {name: logits(bare, given) for name, given in (("ids", ids), ("other", other))}
    model, prefix = sharing(copy.deepcopy(bare))
    for _ in range(3):
        assert torch.equal(logits(model, ids), expected["ids"]), prefix.off
        assert torch.equal(logits(model, other), expected["other"]), prefix.off
    assert prefix.off is not None or prefix.started == 3


def test_rows_are_found_in_any_order_and_batch_and_only_with_the_same_inputs():
    bare = build("Llama").requires_grad_(False)
    model, prefix = sharing(copy.deepcopy(bare))
    ids = token_batch(4)
    for _ in range(2):
        logits(model, ids)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for given, options in (
        (ids[[2, 0]], {}),
        (torch.cat([ids[3:], ids[:3]]), {}),
        (ids, {"attention_mask": mask}),
        (ids[:, :5], {}),
        (ids, {"position_ids": torch.arange(10)[None] + 1}),
    ):
        started = prefix.started
        got = logits(model, given, **options)
        assert torch.allclose(got, logits(bare, given, **options), atol=1e-5)
        assert prefix.started - started == (not options and given.size(1) == 10)
    with torch.no_grad():  # neither a cache nor the blocks' own outputs are shared
        started = prefix.started
        assert model(input_ids=ids).past_key_values.layers[0].keys is not None
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        assert torch.equal(hidden[1], bare(input_ids=ids, output_hidden_states=True).hidden_states[1])
        assert prefix.started == started


def test_a_weight_below_that_was_changed_is_seen():
    model, prefix = sharing(build("Llama").requires_grad_(False))
    ids = token_batch()
    for _ in range(3):
        before = logits(model, ids)
    block = model.get_base_model().model.layers[0]
    with torch.no_grad():
        block.mlp.up_proj.weight.mul_(2)
    changed = logits(model, ids)
    block.mlp.down_proj.weight = nn.Parameter(block.mlp.down_proj.weight / 2, requires_grad=False)
    assert prefix.started == 1 and not torch.equal(changed, before) and not torch.equal(logits(model, ids), changed)


def test_the_reference_and_a_policy_that_moves_start_from_the_same_states():
    bare = build("Llama").requires_grad_(False)
    model, prefix = sharing(copy.deepcopy(bare))
    ids = token_batch()
    for step in range(3):
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), logits(bare, ids))
        policy = model(input_ids=ids, use_cache=False).logits
        policy.logsumexp(-1).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        assert prefix.started == 2 * step
    plain = copy.deepcopy(model)
    assert torch.equal(logits(model, ids), logits(plain.merge_and_unload(), ids))


def test_another_thread_runs_the_blocks_itself():
    model, prefix = sharing(build("Llama").requires_grad_(False))
    ids, found = token_batch(), []
    blocks = model.get_base_model().model.layers
    given = torch.randn(2, 3, 32)
    bare = build("Llama").model.layers[0]
    positions = build("Llama").model.rotary_emb(given, torch.arange(3)[None])
    with torch.no_grad():
        expected = bare(given, position_embeddings=positions)
    for _ in range(2):
        logits(model, ids)

    def beside():
        with torch.no_grad():
            found.append(blocks[0](given, position_embeddings=positions))

    def run_beside(module, args):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()

    blocks[2].register_forward_pre_hook(run_beside)
    logits(model, ids)
    assert prefix.started == 1 and torch.equal(found[-1], expected)


@pytest.mark.parametrize("case", ["dropout", "attention dropout", "embeddings", "compiled", "saved embeddings"])
def test_it_is_off_with_a_word_where_it_would_be_wrong(case):
    base, ids = build("Llama").requires_grad_(False), token_batch()
    if case == "dropout":
        base = gpt2(dropout=0.1).requires_grad_(False)
    elif case == "attention dropout":
        base = build("Llama", attention_dropout=0.1).requires_grad_(False)
    model, prefix = sharing(base)
    passed = {"input_ids": ids}
    match = {
        "dropout": r"a Dropout is random in training \(by 0\.1\)",
        "attention dropout": r"a LlamaAttention is random in training \(by 0\.1\)",
        "embeddings": "the decoder is given embeddings in place of token ids",
        "compiled": "the model is compiled",
        "saved embeddings": "modules_to_save holds a part of the decoder",
    }[case]
    if case == "embeddings":
        passed = {"inputs_embeds": model.get_base_model().get_input_embeddings()(ids)}
    elif case == "saved embeddings":
        model, prefix = sharing(build("Llama").requires_grad_(False), modules_to_save=["embed_tokens"])
        model.requires_grad_(False)
    model.train()
    with pytest.warns(UserWarning, match=f"^the frozen blocks are run in every pass: {match}\\.$"):
        if case == "compiled":
            prefix.on_train_begin(SimpleNamespace(torch_compile=True), None, None)
        with torch.no_grad():
            for _ in range(3):
                model(**passed, use_cache=False)
    assert prefix.off is not None and not prefix.started and not prefix.kept


@pytest.mark.parametrize("case", ["rate", "attribute", "module", "integer"])
def test_what_becomes_random_between_passes_is_noticed(case):
    decoder = build("Llama").model.train()
    assert not_repeatable(decoder) is None and not draws(decoder)
    mlp = decoder.layers[2].mlp
    if case == "rate":
        decoder.layers[2].self_attn.attention_dropout = 0.5
    elif case == "attribute":
        mlp.jitter_noise = 0.5
    else:
        mlp.act_fn = nn.Dropout(1 if case == "integer" else 0.5)
    name = {"rate": "LlamaAttention", "attribute": "LlamaMLP"}.get(case, "Dropout")
    assert not_repeatable(decoder) == f"a {name} is random in training (by {1 if case == 'integer' else 0.5})"
    assert not_repeatable(decoder.eval()) is None and draws(decoder)


def test_eval_mode_shares_in_a_model_with_dropout():
    model, prefix = sharing(gpt2(dropout=0.1).requires_grad_(False))
    model.eval()
    passes = [logits(model, token_batch()) for _ in range(3)]
    assert prefix.started == 1 and prefix.off is None and torch.equal(passes[0], passes[2])


def test_blocks_that_depend_on_more_than_hidden_states_are_found_by_comparing():
    """A sum that the first block adds to and the last one reads."""
    model, _ = sharing(build("Llama").requires_grad_(False))
    layers, seen = model.get_base_model().model.layers, {"mean": torch.zeros(())}
    layers[0].register_forward_hook(lambda module, args, output: seen.update(mean=args[0].mean() + seen["mean"]))
    layers[3].register_forward_hook(lambda module, args, output: output + seen["mean"])
    with pytest.warns(UserWarning, match="blocks above the frozen ones need more of them than the hidden states"):
        for _ in range(2):
            logits(model, token_batch())


def test_noise_below_is_found_by_comparing():
    model, _ = sharing(build("Llama").requires_grad_(False))
    block = model.get_base_model().model.layers[0]
    block.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    with pytest.warns(UserWarning, match="two passes over the same rows differ below the trained block"):
        for _ in range(2):
            logits(model, token_batch())


def test_nothing_below_the_block_nothing_shared():
    model, prefix = sharing(build("Llama").requires_grad_(False), layer=0)
    for _ in range(3):
        logits(model, token_batch())
    assert prefix.started == prefix.whole == 0 and prefix.off is None


def test_a_token_of_a_generation_costs_no_look_through_the_model(monkeypatch):
    model, prefix = sharing(build("Llama").requires_grad_(False))
    looks = []
    monkeypatch.setattr(SharedPrefix, "_frozen", lambda self: (looks.append(self) or 2, []))
    logits(model, token_batch())
    assert len(looks) == 1
    tokens = model.generate(input_ids=token_batch(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape[1] == token_batch().shape[1] + 4 and len(looks) == 1 and prefix.whole == 1


def test_nothing_is_left_behind_and_copies_hold_nothing(tokenizer, tmp_path):
    base = build()
    prefix, *_ = run("dpo", tokenizer, tmp_path, share=True, base=base)
    decoder = base.model
    assert not prefix.kept and all(prefix not in vars(hook).values() for hook in decoder._forward_hooks.values())
    assert not any(getattr(hook, "__self__", None) is prefix for hook in decoder._forward_pre_hooks.values())
    assert not any("forward" in vars(block) for block in decoder.layers)
    model, prefix = sharing(build())
    logits(model, token_batch())
    copied = copy.deepcopy(model)
    (twin,) = [h.__self__ for h in copied.get_base_model().model._forward_hooks.values()]
    assert prefix.kept and isinstance(twin, SharedPrefix) and twin is not prefix and not twin.kept


def test_an_exception_in_a_pass_leaves_the_blocks_as_they_were():
    model, prefix = sharing(build("Llama").requires_grad_(False))
    ids = token_batch()
    expected = logits(model, ids)
    logits(model, ids)
    handle = model.get_base_model().model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            logits(model, ids)
    handle.remove()
    assert not any("forward" in vars(block) for block in model.get_base_model().model.layers)
    assert torch.equal(logits(model, ids), expected) and prefix.off is None


def test_a_model_that_is_not_wrapped_is_refused(tokenizer, tmp_path):
    trainer = trainer_of("grpo", build(), tokenizer, tmp_path, beta=0.0)
    with pytest.raises(ValueError, match="the trainer's model, a Qwen3ForCausalLM, is not wrapped with SingleLayerCo"):
        shared_prefix(trainer)
