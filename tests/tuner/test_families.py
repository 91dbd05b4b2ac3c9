"""Every decoder family of transformers: what trains, its gradients, the graph cut, files, merging, generation.

The default run takes the families of `SHOWN`, `more` the others below; `slow` takes every causal language model that
transformers maps.
"""

import copy
import re
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves

from models import EVERY, MULTIMODAL, build_architecture, build_multimodal, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner import find_decoder_stack, resolve_layers
from peft_onelayer.tuner.stack import DecoderStack
from tuner.helpers import base_name, base_weights, masters, move, same

DENSE = """apertus bloom codegen cohere cohere2 falcon gemma gemma2 gemma3_text gemma3n_text gemma4_text glm4
gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite llama mistral mpt olmo2 opt phi phi3 qwen2 qwen3 smollm3
stablelm starcoder2"""
EXPERTS = "afmoe deepseek_v2 deepseek_v3 gpt_oss mixtral olmoe qwen2_moe qwen3_moe"
LINEAR_ATTENTION = "falcon_h1 falcon_mamba jamba mamba mamba2 qwen3_5_text qwen3_next recurrent_gemma"
ODD = "bart bert ctrl deepseek_v32 inkling2_text xlnet"
FAMILIES = f"{DENSE} {EXPERTS} {LINEAR_ATTENTION} {ODD}".split()
# One of each kind of block: fused and transposed weights, parallel branches, shared inputs, experts, states, others.
SHOWN = "ctrl falcon gemma3_text gemma4_text gpt2 gpt_oss llama mamba2 mixtral qwen3 qwen3_next"
SHOWN_TWICE = ["qwen3"]  # with several blocks too
LAYERS = {"middle": "middle", "first and last": [0, -1]}

# Parameters that get no gradient in full fine-tuning either, by the end of their names.
INDEXER = r"\.indexer\."  # chooses tokens by a top-k, which has no gradient; its own loss is not in transformers
BALANCE = r"(expert_bias|e_score_correction_bias)$"  # moved by a rule that balances the experts' load
NO_ENCODER = r"\.encoder_attn"  # cross-attention that a decoder alone does not run
WITHOUT_GRADIENT = {
    **dict.fromkeys(["axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"], INDEXER),
    **dict.fromkeys(["afmoe", "ernie4_5_moe", "laguna"], BALANCE),
    **dict.fromkeys(
        ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"], NO_ENCODER
    ),
    **dict.fromkeys(["plbart", "trocr", "whisper"], NO_ENCODER),
    # its first three blocks compress spans longer than the batch, the last one chooses by a top-k
    "deepseek_v4": rf"\.[012]\.self_attn\.compressor\.|{INDEXER}",
    "prophetnet": r"\.cross_attn",
    "xlnet": r"\.(r_s_bias|seg_embed)$",  # segments are not given
}
EMBEDDINGS_CHANGED_IN_PLACE = {"ctrl"}  # `inputs_embeds *= ...` fails on a leaf, so enable_input_require_grads does too


@dataclass
class Case:
    """A frozen base and what is trained of it."""

    base: nn.Module
    layer: int | str | list[int]
    without_gradient: str = "(?!)"
    pattern: str | None = None
    inputs: dict = field(default_factory=dict)
    task_type: str | None = "CAUSAL_LM"
    hookable: bool = True
    tokens: torch.Tensor = field(default_factory=token_batch)

    @property
    def stack(self) -> DecoderStack:
        return find_decoder_stack(self.base, self.pattern)

    @property
    def indices(self) -> list[int]:
        return resolve_layers(self.layer, len(self.stack.blocks))

    @property
    def trained(self) -> set[str]:
        name, blocks = self.stack.name, self.stack.blocks
        return {f"{name}.{i}.{n}" for i in self.indices for n, _ in blocks[i].named_parameters()}

    def wrap(self, base: nn.Module | None = None) -> PeftModel:
        config = SingleLayerConfig(layer=self.layer, layers_pattern=self.pattern, task_type=self.task_type)
        return get_peft_model(copy.deepcopy(self.base) if base is None else base, config)

    def full_fine_tuning(self) -> nn.Module:
        """An unwrapped copy whose chosen blocks train."""
        model = copy.deepcopy(self.base)
        for name in self.trained:
            model.get_parameter(name).requires_grad_()
        return model

    def run(self, model: nn.Module):
        torch.manual_seed(0)  # dropout and routing noise
        return model(input_ids=self.tokens, labels=self.tokens, **{"use_cache": False, **self.inputs})

    @torch.no_grad()
    def logits(self, model: nn.Module) -> torch.Tensor:
        return self.run(model.eval()).logits

    def loss(self, model: nn.Module, use_reentrant: bool | None = None) -> torch.Tensor:
        """Run a training step's forward and backward pass."""
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = self.run(model.train()).loss
        loss.backward()
        return loss.detach()

    def given_what_needs_gradients(self, model: nn.Module, blocks: int) -> list[bool]:
        """For each of the first `blocks` blocks, whether it is called with a tensor that requires gradients."""
        needed: list[bool] = []

        def record(_, args, kwargs) -> None:
            needed.append(any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves((args, kwargs))))

        modules = find_decoder_stack(model, self.pattern).blocks[:blocks]
        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in modules]
        self.run(model.train())
        for handle in handles:
            handle.remove()
        return needed[:blocks]  # of the first time through the stack, where there are several


def check_training(case: Case) -> None:
    """Exactly the blocks train, with the gradients of full fine-tuning, and a step moves nothing else."""
    model, reference = case.wrap(), case.full_fine_tuning()
    require_grad = [base_name(name) for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(require_grad) == sorted(case.trained) and masters(model).keys() == case.trained
    # torch.matmul chooses its kernel by whether an operand requires gradients: compare like with like
    assert torch.equal(case.logits(model), case.logits(reference))
    for use_reentrant in (True, False, None) if case.base.supports_gradient_checkpointing else (None,):
        model, reference = case.wrap(), case.full_fine_tuning()
        if use_reentrant:  # which gives a plain model no gradients otherwise
            reference.enable_input_require_grads()
        assert torch.equal(case.loss(model, use_reentrant), case.loss(reference, use_reentrant))
        still = set()
        for name, master in masters(model).items():
            expected = reference.get_parameter(name).grad
            if expected is None or not expected.any():
                still.add(name)
                assert master.grad is None or not master.grad.any(), name
            else:
                assert torch.equal(master.grad, expected), (name, use_reentrant)
        assert still == {name for name in case.trained if re.search(case.without_gradient, name)}
    before = {name: p.detach().clone() for name, p in masters(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(trained, lr=1e-2, weight_decay=0).step()
    assert {name for name, p in masters(model).items() if torch.equal(p, before[name])} == still
    untouched = dict(case.base.named_parameters(remove_duplicate=False))
    assert same(base_weights(model), {name: p.data for name, p in untouched.items()})
    with model.disable_adapter():
        assert torch.equal(case.logits(model), case.logits(case.base))


def check_cut(case: Case) -> None:
    """Nothing that a block at or below the first trained one is given needs a gradient."""
    if not case.hookable:
        return
    base, blocks = copy.deepcopy(case.base), case.indices[0] + 1
    base.enable_input_require_grads()
    assert case.given_what_needs_gradients(base, blocks) == [True] * blocks
    assert case.given_what_needs_gradients(case.wrap(base), blocks) == [False] * blocks


def check_files_and_merging(case: Case, folder) -> None:
    """Loading, merging and unmerging are exact, and generation with a cache uses the adapter."""
    expected, state = case.logits(case.base), {n: t.clone() for n, t in case.base.state_dict().items()}
    model = case.wrap()
    move(model)
    tuned = case.logits(model.requires_grad_(False))
    assert not torch.equal(tuned, expected)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(case.base), folder)
    assert torch.equal(case.logits(loaded), tuned)
    loaded.merge_adapter()
    assert torch.equal(case.logits(loaded), tuned)
    loaded.unmerge_adapter()
    assert torch.equal(case.logits(loaded), tuned)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = loaded.generate(input_ids=token_batch(), **options)
    assert same(dict(loaded.unload().state_dict()), state)
    merged = model.merge_and_unload()
    assert torch.equal(case.logits(merged), tuned) and list(merged.state_dict()) == list(state)
    assert torch.equal(merged.generate(token_batch(), **options), generated)


def check(case: Case, folder) -> None:
    check_training(case)
    check_cut(case)
    check_files_and_merging(case, folder)


def of_family(family: str, layer: int | str | list[int], **config) -> Case:
    without_gradient = WITHOUT_GRADIENT.get(family, "(?!)")
    hookable = family not in EMBEDDINGS_CHANGED_IN_PLACE
    return Case(build_architecture(family, **config), layer, without_gradient, hookable=hookable)


def choices(names, shown, shown_twice):
    """Each name with one block and with two; `more`, but for those of `shown` with one, of `shown_twice` with both."""
    for name in names:
        for layer_id, layer in LAYERS.items():
            by_default = name in (shown_twice if layer_id == "first and last" else shown)
            marks = [] if by_default else [pytest.mark.more]
            yield pytest.param(name, layer, id=f"{name}-{layer_id}", marks=marks)


@pytest.mark.parametrize(("family", "layer"), list(choices(FAMILIES, SHOWN.split(), SHOWN_TWICE)))
def test_family(tmp_path, family, layer):
    check(of_family(family, layer), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, "middle", -1, [1, 3]], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_every_family(tmp_path, family, layer):
    check(of_family(family, layer), tmp_path)


@pytest.mark.parametrize(("model_type", "layer"), list(choices(MULTIMODAL, ["gemma3"], [])))
def test_the_text_stack_of_a_multimodal_model(tmp_path, model_type, layer):
    inputs = {"token_type_ids": torch.zeros_like(token_batch())} if model_type in ("gemma3", "paligemma") else {}
    check(Case(build_multimodal(model_type), layer, inputs=inputs), tmp_path)


def test_training_on_images():
    """The image's features replace those of four tokens; the cut is above both."""
    tokens = token_batch().clamp(max=62)
    tokens[:, 2:6] = 63
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images, "token_type_ids": (tokens == 63).long()}
    case = Case(build_multimodal("gemma3"), "middle", inputs=inputs, tokens=tokens)
    check_training(case)
    check_cut(case)


def encoder_decoder(name: str, encoder: int = 4, decoder: int = 4) -> nn.Module:
    sizes = {"num_layers": encoder, "num_decoder_layers": decoder, "num_heads": 4, "d_kv": 8}
    sizes |= {"decoder_start_token_id": 0}
    if name == "bart":
        sizes = {f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
        sizes |= {"encoder_layers": encoder, "decoder_layers": decoder}
    return build_architecture(name, transformers.AutoModelForSeq2SeqLM, **sizes)


SIDES = {
    f"{name}-{side}": (name, f"{side}.{end}")
    for name, end in (("t5", "block"), ("bart", "layers"))
    for side in ("encoder", "decoder")
}


@pytest.mark.parametrize(("side", "layer"), list(choices(SIDES, ["t5-encoder"], [])))
def test_either_stack_of_an_encoder_decoder_model(tmp_path, side, layer):
    name, pattern = SIDES[side]
    check(Case(encoder_decoder(name), layer, pattern=pattern, task_type="SEQ_2_SEQ_LM"), tmp_path)


@pytest.mark.more
@pytest.mark.parametrize("stack", ["L_module.layers", pytest.param("H_module.layers", marks=pytest.mark.more)])
def test_a_stack_that_runs_several_times_per_pass(tmp_path, stack):
    for layer in (0, 2):
        case = Case(build_architecture("hrm_text"), layer, pattern=stack)
        check_training(case)  # whose first cycles run without gradients, so there is little to cut
        check_files_and_merging(case, tmp_path)


def test_layers_that_all_run_one_block():
    """ALBERT's stack is one group of weights, run three times."""
    config = transformers.AlbertConfig(vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48)
    config.num_hidden_layers, config.num_attention_heads = 3, 4
    torch.manual_seed(0)
    base = transformers.AlbertForMaskedLM(config).requires_grad_(False)
    name = "albert.encoder.albert_layer_groups.0."
    reference = copy.deepcopy(base).train()
    for parameter in reference.get_submodule(name[:-1]).parameters():
        parameter.requires_grad_()
    base.enable_input_require_grads()
    model = get_peft_model(base, SingleLayerConfig(layer=0)).train()
    for each in (model, reference):
        torch.manual_seed(0)
        each(input_ids=token_batch(), labels=token_batch()).loss.backward()
    assert len(masters(model)) == 16 and all(n.startswith(name) for n in masters(model))
    assert all(torch.equal(p.grad, reference.get_parameter(n).grad) for n, p in masters(model).items())


@pytest.mark.parametrize(
    ("family", "layer", "match"),
    [
        ("doge", 1, r"owns parameters directly \(input_residual, post_attention_residual\).*target_modules"),
        ("hrm_text", 0, r"L_module\.layers \(4 blocks\), model\.H_module\.layers \(4 blocks\); pass layers_pattern"),
        ("xlm", 0, r"transformer\.attentions \(4 blocks\), transformer\.layer_norm1 .*layers_pattern"),
        ("zamba", 3, r"is shared with model\.layers\.1\."),
        ("zamba2", [1, 3], r"is shared with model\.layers\.3\."),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(family, layer, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(build_architecture(family), SingleLayerConfig(layer=layer))


def test_a_model_of_several_stacks_and_no_depth_is_refused():
    with torch.device("meta"):
        model = transformers.BltForCausalLM(transformers.BltConfig())
    with pytest.raises(
        ValueError, match=r"more than one stack .*global_transformer\.layers \(25 blocks\).*layers_pattern"
    ):
        get_peft_model(model, SingleLayerConfig(layer=0))


@pytest.mark.parametrize(("encoder", "decoder"), [(4, 4), (4, 2), (2, 4)])
@pytest.mark.parametrize(("name", "end"), [("t5", "block"), ("bart", "layers")])
def test_an_encoder_and_a_decoder_are_refused_without_the_pattern(name, end, encoder, decoder):
    """Also where only one of them is as long as the configuration's num_hidden_layers."""
    found = rf"encoder\.{end} \({encoder} blocks\), .*decoder\.{end} \({decoder} blocks\); pass layers_pattern"
    with pytest.raises(ValueError, match=found):
        get_peft_model(encoder_decoder(name, encoder, decoder), SingleLayerConfig(layer=0))


def test_parts_of_a_block_that_owns_parameters():
    model = get_peft_model(build_architecture("doge"), SingleLayerConfig(layer=1, target_modules=["self_attn", "mlp"]))
    assert {name.split(".")[3] for name in masters(model)} == {"self_attn", "mlp"}


@pytest.mark.parametrize(
    "falcon", [{"parallel_attn": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}], ids=str
)
def test_falcons_other_architectures(tmp_path, falcon):
    check(of_family("falcon", "middle", **falcon), tmp_path)


TASKS = {
    "SEQ_CLS": (transformers.AutoModelForSequenceClassification, "score"),
    "TOKEN_CLS": (transformers.AutoModelForTokenClassification, "score|classifier"),
    "QUESTION_ANS": (transformers.AutoModelForQuestionAnswering, "qa_outputs"),
    "FEATURE_EXTRACTION": (transformers.AutoModel, None),
    None: (transformers.AutoModelForCausalLM, None),
}


@pytest.mark.parametrize("task_type", TASKS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_tasks(tmp_path, family, task_type):
    """The head trains beside the block, is saved with it, and comes back."""
    auto_class, head = TASKS[task_type]
    case = Case(build_architecture(family, auto_class), "middle", task_type=task_type)
    model = case.wrap()
    assert masters(model).keys() == case.trained
    others = {n for n, p in model.named_parameters() if p.requires_grad and "single_layer_params" not in n}
    assert bool(others) == bool(head) and all(re.search(rf"\.({head})\.modules_to_save\.", name) for name in others)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    model.requires_grad_(False).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(case.base), tmp_path)
    expected = model(input_ids=token_batch())[0]
    assert torch.equal(loaded(input_ids=token_batch())[0], expected)
    assert not torch.equal(case.base(input_ids=token_batch())[0], expected)
    assert torch.equal(model.merge_and_unload()(input_ids=token_batch())[0], expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "qwen3_moe"])
def test_hooks_hidden_states_and_beam_search(family):
    case = of_family(family, 1)
    model = case.wrap()
    move(model)
    merged = copy.deepcopy(model).merge_and_unload()
    seen = []
    block = model.get_submodule(f"base_model.model.{case.stack.name}.1")
    block.register_forward_hook(lambda _, __, output: seen.append(output if torch.is_tensor(output) else output[0]))
    states = model.requires_grad_(False)(token_batch(), output_hidden_states=True).hidden_states
    expected = merged(token_batch(), output_hidden_states=True).hidden_states
    assert len(states) == 5 and all(map(torch.equal, states, expected)) and torch.equal(seen[0], states[2])
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=token_batch(), **options), merged.generate(token_batch(), **options))
