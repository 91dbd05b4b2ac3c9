"""Tiny models built from configurations: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = ("Qwen3", "Qwen2", "Llama", "Gemma3Text", "Mistral")


def build(family: str = "Qwen3", *, num_layers: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, **config):
    """A causal LM of `family` with `num_layers` blocks of width 32 and a vocabulary of 64, randomly initialised."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    torch.manual_seed(seed)
    name = "Gemma3" if family == "Gemma3Text" else family
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    for parameter in model.parameters():  # norms start at one and zero-initialised tensors hide mistakes: move them all
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def token_batch(batch: int = 3, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens, (batch, length) int64."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def block_parameters(model: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """The parameters of block `index` of an unwrapped transformers model, by their name inside the block."""
    return dict(model.get_decoder().layers[index].named_parameters())


# The architectures of transformers, by model type: what `tiny` cannot know of their configurations.
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}  # latent attention
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
PER_LAYER_INPUTS = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
DECODER = {"decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
SHORT_RELATIVE = {"d_rel": 4, "rel_extent": 16, "sliding_window_size": 8} | {
    f"swa_{name}": size for name, size in (("num_attention_heads", 4), ("num_key_value_heads", 2), ("head_dim", 8))
}
ARCHITECTURES: dict[str, dict] = {
    "afmoe": {},
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT | LINEAR_FIRST,
    "bamba": MAMBA2 | {"attn_layer_indices": [1, 3]},
    "bart": DECODER,
    "bigbird_pegasus": DECODER,
    "blenderbot": DECODER,
    "blenderbot-small": DECODER,
    "codegen": {"rotary_dim": 4},
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 48},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": LATENT
    | {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, "hc_mult": 2},
    "cohere_compass_text": TWO_KINDS
    | {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in TWO_KINDS["layer_types"]}},
    "dbrx": {"n_heads": 4, "n_layers": 4, "max_seq_len": 128}
    | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}
    | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": LATENT | {"shared_experts_intermediate_size": 16},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "gemma3n_text": TWO_KINDS
    | PER_LAYER_INPUTS
    | {"num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2}
    | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": TWO_KINDS | PER_LAYER_INPUTS | {"global_head_dim": 8},
    "gemma4_unified_text": TWO_KINDS | {"global_head_dim": 8},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 48},
    "inkling2_text": SHORT_RELATIVE | {"unpadded_vocab_size": 64},
    "inkling_text": SHORT_RELATIVE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0}
    | {"mamba_d_state": 8, "mamba_dt_rank": 4},
    "kimi_linear": LATENT | LINEAR_FIRST | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT
    | {"num_layers": 4, "num_hidden_layers": 8, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16}
    | {"moe_topk": 2, "zero_expert_num": 2, "head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "marian": DECODER,
    "mbart": DECODER,
    "minicpm3": LATENT,
    "minimax_m3_vl_text": {"dense_intermediate_size": 48, "shared_intermediate_size": 16, "rotary_dim": 4}
    | {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 8, "index_topk_blocks": 2},
    "mvp": DECODER,
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mamba"], "mamba_num_heads": 4}
    | {"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    | {"moe_shared_expert_intermediate_size": 16},
    "pegasus": DECODER,
    "plbart": DECODER,
    "prophetnet": {"num_decoder_layers": 4, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "qwen3_5_moe_text": LINEAR_FIRST,
    "qwen3_5_text": LINEAR_FIRST,
    "qwen3_next": LINEAR_FIRST,
    "roc_bert": {f"{name}_embed_dim": 8 for name in ("pronunciation", "shape")}
    | {f"{name}_vocab_size": 8 for name in ("pronunciation", "shape")},
    "trocr": DECODER,
    "whisper": DECODER | {"max_target_positions": 64},
    "xlnet": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 1, "mode": "train"}
    | {"ffn_round_up_to_multiple_of": 8, "hidden_size": 64},  # its cache rounds the heads up to a width of 16
    "youtu": LATENT,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "chunk_size": 8, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
QWEN_VISION |= {"out_hidden_size": 32}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
IMAGE = {"image_token_id": 63, "video_token_id": 62}
# Text and vision configurations; the sizes of the text's are added.
MULTIMODAL: dict[str, dict] = {
    "gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 63},
    "idefics3": {"text_config": {"model_type": "llama"}, "vision_config": VISION, "image_token_id": 63},
    "internvl": {"text_config": {"model_type": "qwen2"}, "image_token_id": 63}
    | {"vision_config": VISION | {"image_size": [16, 16], "patch_size": [8, 8]}},
    "llama4": {"text_config": {"intermediate_size_mlp": 48, "num_experts_per_tok": 1}, "image_token_index": 63}
    | {
        "vision_config": VISION
        | {f"{name}_dim": 32 for name in ("vision_output", "projector_input", "projector_output")}
    },
    "llava": {"text_config": {"model_type": "llama"}, "image_token_index": 63}
    | {"vision_config": VISION | {"model_type": "clip_vision_model"}},
    "mistral3": {"text_config": {"model_type": "mistral"}, "image_token_index": 63}
    | {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}},
    "paligemma": {"text_config": {"model_type": "gemma"}, "image_token_index": 63, "projection_dim": 32}
    | {"vision_config": VISION | {"model_type": "siglip_vision_model"}},
    "qwen2_5_vl": {"text_config": SECTIONS, "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0]}, **IMAGE},
    "qwen3_5": {"text_config": SECTIONS | LINEAR_FIRST, **IMAGE}
    | {"vision_config": QWEN_VISION | {"num_position_embeddings": 16}},
    "qwen3_vl": {"text_config": SECTIONS, **IMAGE}
    | {"vision_config": QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    "smolvlm": {"text_config": {"model_type": "llama"}, "vision_config": VISION, "image_token_id": 63},
}

# Sizes under the names that most configurations use; each class takes those it declares.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 128,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def build_architecture(
    model_type: str, auto_class: type = transformers.AutoModelForCausalLM, dtype: torch.dtype = torch.float32, **config
):
    """A randomly initialised model of `model_type` with 4 blocks of width 32, its base parameters frozen.

    `config` adds to what `ARCHITECTURES` says and wins over it.
    """
    config_class = transformers.CONFIG_MAPPING[model_type]
    declared = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    given = ARCHITECTURES.get(model_type, {}) | config
    sizes = {name: value for name, value in (SIZES | given).items() if name in declared}
    for name, other in config_class.attribute_map.items():  # two names of one field
        if other in given:
            sizes.pop(name, None)
    return randomly_initialised(auto_class, config_class(**(sizes | config)), dtype)


def build_multimodal(model_type: str, dtype: torch.dtype = torch.float32):
    """As `build_architecture`, of a model that also takes images."""
    given = MULTIMODAL[model_type]
    config = transformers.CONFIG_MAPPING[model_type](**{**given, "text_config": SIZES | given.get("text_config", {})})
    return randomly_initialised(transformers.AutoModelForImageTextToText, config, dtype)


def randomly_initialised(auto_class: type, config, dtype: torch.dtype):
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(dtype).eval().requires_grad_(False)


# Those that transformers also lists and the tests of every family leave out: refused, or multimodal, or not comparable.
TESTED_ELSEWHERE = "blt doge gemma3 hrm_text llama4 qwen3_5 xlm zamba zamba2"
MULTIMODAL_TOO = """aria_text emu3 fuyu dots3_note gemma3n gemma4 gemma4_assistant gemma4_unified
gemma4_unified_assistant git got_ocr2 mllama moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal
qwen3_5_moe qwen4_exp"""
NOT_COMPARED = {
    "inkling_text": "its own gradients with and without checkpointing differ in the last bit",
    "phimoe": "whether its router gets a gradient depends on the data",
    "qwen4_exp_text": "has tables of n-grams that cannot be made small",
    "reformer": "its reversible layers run their own autograd function, which fails when the embeddings are frozen",
}
LEFT_OUT = {*TESTED_ELSEWHERE.split(), *MULTIMODAL_TOO.split(), *NOT_COMPARED}
EVERY = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - LEFT_OUT)
