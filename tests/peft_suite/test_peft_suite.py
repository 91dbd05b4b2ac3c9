"""PEFT's own tests, run against SingleLayerConfig. The tables name every generic test and what becomes of it.

A test has to run to its end: where PEFT's code leaves it, by `pytest.skip` or an early `return`, that is a failure. The
deselected tests are called too, and have to end in the way that their reason says.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import sys
from typing import Any

import pytest
import torch
import transformers

from peft_onelayer import SingleLayerConfig

from .source import fetch, load

pytestmark = pytest.mark.slow

LAYERS = (0, -1, [1, 2])
MODEL_TYPES = ("qwen3", "qwen2", "llama", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "gpt2")
TASKS = {  # besides language models: PEFT's test class, transformers' auto class
    "SEQ_CLS": ("test_seq_classifier.TestSequenceClassificationModels", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("test_token_classification_qa.TestTokenClassificationModels", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("test_token_classification_qa.TestQuestionAnsweringModels", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("test_feature_extraction_models.TestPeftFeatureExtractionModel", "AutoModel"),
}
FAMILIES = (*MODEL_TYPES, "toy", *TASKS)
NOT_LM = ("toy", *TASKS)

HALF = [{"dtype": torch.float16}, {"dtype": torch.bfloat16}]
SAFE_OR_PICKLE = [{"safe_serialization": True}, {"safe_serialization": False}]

# testing_common.PeftCommonTester: method -> the arguments of each run.
COMMON: dict[str, list[dict[str, Any]]] = {
    "_test_model_attr": [{}],
    "_test_adapter_name": [{}],
    "_test_prepare_for_training": [{}],
    "_test_load_model_low_cpu_mem_usage": [{}],
    "_test_save_pretrained": SAFE_OR_PICKLE,
    "_test_save_pretrained_selected_adapters": SAFE_OR_PICKLE,
    "_test_save_pretrained_adapter_name_substring": [{}],
    "_test_load_multiple_adapters": [{}],
    "_test_add_adapter_no_autocast_adapter_dtype": HALF,
    "_test_merge_layers_fp16": [{}],
    "_test_merge_layers_nan": [{}],
    "_test_merge_layers": [{}],
    "_test_merge_layers_multi": [{}],
    "_test_merge_layers_is_idempotent": [{}],
    "_test_safe_merge": [{}],
    "_test_mixed_adapter_batches": [{}],
    "_test_generate_with_mixed_adapter_batches_and_beam_search": [{}],
    "_test_generate": [{}],
    "_test_generate_pos_args": [{"raises_err": False}],
    "_test_generate_half_prec": [{}],
    "_test_training": [{}],
    "_test_inference_safetensors": [{}],
    "_test_training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
    "_test_peft_model_device_map": [{}],
    "_test_delete_adapter": [{}],
    "_test_delete_inactive_adapter": [{}],
    "_test_delete_unknown_adapter_raises": [{}],
    "_test_unload_adapter": [{}],
    "_test_weighted_combination_of_adapters": [{}],
    "_test_disable_adapter": [{}],
    "_test_passing_input_embeds_works": [{"test_name": ""}],
    "_test_get_base_model_state_dict": [{}],
}
# PEFT runs these only for the types it names. Ours goes by that name here, in PEFT's test module alone; the adapters
# are then combined by `_test_weighted_combination_of_adapters_ia3`.
GOES_BY = {
    "_test_mixed_adapter_batches": "LoraConfig",
    "_test_generate_with_mixed_adapter_batches_and_beam_search": "LoraConfig",
    "_test_weighted_combination_of_adapters": "IA3Config",
}
# method -> families, reason, how the call ends: PEFT's skip, its early return, or the error of the model.
NO_GENERATE = (NOT_LM, "the model has no generate (and the toy no input_ids)", "no attribute 'generate'|'input_ids'")
NO_EMBEDDINGS = (("toy",), "the toy has no embeddings", "no attribute 'get_input_embeddings'")
DESELECTED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "_test_training_layer_indexing": (FAMILIES, "only for layers_to_transform", "does not support layers_to_transform"),
    "_test_training_prompt_learning_tasks": (FAMILIES, "only for prompt learning", "Test not applicable"),
    "_test_adding_multiple_adapters_with_bias_raises": (
        FAMILIES,
        "only for types with a `bias` argument",
        "does not support the 'bias' argument",
    ),
    "_test_from_pretrained_config_construction": (
        FAMILIES,
        "its last check is that the model holds the caller's config; ours keeps a copy, which resolves the layers",
        "is SingleLayerConfig",
    ),
    "_test_lora_conversion": (FAMILIES, "only for types with a low-rank update that converts to LoRA", "return"),
    "_test_disable_adapter": NO_GENERATE,  # its branch for such models looks for generate on PeftModel, which has it
    "_test_generate": NO_GENERATE,
    "_test_generate_pos_args": NO_GENERATE,
    "_test_generate_half_prec": NO_GENERATE,
    "_test_generate_with_mixed_adapter_batches_and_beam_search": NO_GENERATE,
    "_test_mixed_adapter_batches": NO_GENERATE,
    "_test_weighted_combination_of_adapters": (
        ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"),
        "trained heads cannot be combined, PEFT refuses it for LoRA and IA3 too",
        "modules_to_save",
    ),
    "_test_prepare_for_training": NO_EMBEDDINGS,
    "_test_passing_input_embeds_works": NO_EMBEDDINGS,
    "_test_training_gradient_checkpointing": (
        ("toy", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"),
        "the toy does not checkpoint; the others train a head, which PEFT's last check forbids to any type",
        "not support gradient checkpointing|is None",
    ),
}
# Parts of `_test_weighted_combination_of_adapters`, not tests: the second is reached through it (GOES_BY).
HELPERS = {
    "_test_weighted_combination_of_adapters_lora": "only for LoRA: asks for ranks and SVD",
    "_test_weighted_combination_of_adapters_ia3": "run by _test_weighted_combination_of_adapters",
}

# The generic tests of PEFT's test classes (those that take a config class) which do not just call one of the above:
# test -> the arguments of each run, or why it does not apply. They build PEFT's `MLP`, which is the toy here.
ONCE: list[dict[str, Any]] = [{}]  # names modules of blocks 0, 1 and 2 itself, or needs no layer
RUN: list[dict[str, Any]] = [{"layer": layer} for layer in LAYERS]
LAYER_0, LAYER_1, LAYER_01 = ({"layer": layer, "init_weights": False} for layer in (0, 1, [0, 1]))
PAIRS = [{"config_kwargs_1": LAYER_0, "config_kwargs_2": other} for other in (LAYER_0, LAYER_1, LAYER_01)]
MIXED = [{"config0": LAYER_0, "config1": other} for other in (LAYER_0, LAYER_1, LAYER_01)]
HEAD = {"modules_to_save": ["out"]}
OTHERS: dict[str, dict[str, list[dict[str, Any]] | str]] = {
    "test_custom_models.TestPeftCustomModel": {
        "test_save_load_roundtrip_direct_injection": RUN,
        "test_merge_layers_is_deterministic_in_train_mode": RUN,
        "test_in_features_out_features_exposed": RUN,
        "test_forward_output_finite": RUN,
        "test_forward_float16": RUN,
        "test_forward_bfloat16": RUN,
        "test_forward_float16_no_autocast": RUN,
        "test_forward_bfloat16_no_autocast": RUN,
        "test_adapter_dtype_autocast": [
            {"layer": layer, "dtype": dtype, "autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low}
            for layer in LAYERS
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
            for autocast in (True, False)
            for low in (True, False)
        ],
        "test_only_params_are_updated": RUN,
        "test_save_load_roundtrip": RUN,
        "test_parameters_after_loading_model": RUN,
        "test_disable_adapters": RUN,
        "test_disable_adapters_with_merging": RUN,
        "test_disable_adapter_with_bias_warns": "PEFT skips it for every type (`!= LoraConfig or != BOFTConfig`)",
        "test_active_adapter": RUN,
        "test_set_adapter_non_overlapping_modules": ONCE,
        "test_set_adapter_non_overlapping_modules_to_save": ONCE,
        "test_multiple_active_adapters_with_same_modules_to_save_raises": ONCE,
        "test_multiple_active_adapters_with_overlapping_modules_to_save_raises": ONCE,
        "test_multiple_active_adapters_with_different_modules_to_save_works": ONCE,
        "test_disable_adapters_exiting_context_restores_previous_state": RUN,
        "test_disable_adapter_is_reentrant": RUN,
        "test_disable_adapters_exiting_context_irregular_state": RUN,
        "test_delete_merged_adapter_raises_without_mutation": RUN,
        "test_delete_merged_adapter_only_rejects_the_merged_one": RUN,
        "test_delete_adapter_properly_cleans_up_after_itself": RUN,
        "test_set_requires_grad": ONCE,
        "test_adapter_name_makes_no_difference": [{"config0": LAYER_0}],
        "test_multiple_adapters_mixed_modules_to_save": "asks for `lin1` outside of the blocks; the toy has `out`",
        "test_multiple_adapters_mixed_modules_to_save_order_switched": "as the one before",
        "test_add_weighted_adapter_cat_with_rank_pattern": "only for LoRA: asks for `rank_pattern`",
    },
    "test_custom_models.TestMultipleActiveAdapters": {
        "test_multiple_active_adapters_forward": PAIRS,
        "test_multiple_active_adapters_merge_and_unmerge": PAIRS,
        "test_merge_layers_multi": PAIRS,
        "test_sequential_merge_matches_batch_merge": PAIRS,
        "test_unmerge_after_sequential_merge_restores_base": PAIRS,
    },
    "test_custom_models.TestRequiresGrad": {
        "test_loading_model_requires_grad_set_correctly": [{"is_trainable": True}, {"is_trainable": False}],
        "test_loading_model_with_modules_to_save_requires_grad_set_correctly": [
            {"is_trainable": True},
            {"is_trainable": False},
        ],
    },
    "test_custom_models.TestMixedAdapterBatches": {
        "test_mixed_adapter_batches_mlp": MIXED,
        "test_mixed_adapter_batches_different_target_layers": [{"config0": LAYER_0, "config1": LAYER_1}],
        "test_mixed_adapter_batches_partly_overlapping_target_layers": [{"config0": LAYER_0, "config1": LAYER_01}],
        "test_mixed_adapter_batches_multiple_modules_to_save": [{"config0": LAYER_0 | HEAD, "config1": LAYER_1 | HEAD}],
        "test_mixed_adapter_batches_length_mismatch_raises": MIXED,
        "test_mixed_adapter_batches_training_mode_raises": MIXED,
        "test_mixed_adapter_batches_disabled": MIXED,
        "test_mixed_adapter_batches_merged_raises": MIXED,
        "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": [{"config": LAYER_0}],
        "test_mixed_adapter_batches_unsupported_layer_raises": "builds a model without blocks (MLPWithGRU)",
        "test_mixed_adapter_batches_lora_conv1d_emb": "builds a model without blocks (ModelEmbConv1D)",
        "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": "builds a model without blocks",
        "test_mixed_adapter_batches_lora_conv2d": "builds a model without blocks (ModelConv2D)",
        "test_mixed_adapter_batches_mha_raises": "builds a model without blocks (ModelMha)",
        "test_mixed_adapter_batches_lora_opt_timing": "asserts wall time",
    },
    "test_custom_models.TestDefaultTargetModules": dict.fromkeys(
        (
            "test_default_target_modules_not_set_raises",
            "test_default_target_modules_not_set_model_type_set_raises",
            "test_default_target_modules_list_of_str",
            "test_default_target_modules_str",
        ),
        "only for types whose default target_modules depend on the model; ours is the whole block",
    ),
    "test_custom_models.TestPeftFsdpStateDict": {
        "test_save_load_roundtrip_fsdp_wrapped": "FSDP1, whose flattened parameters are refused; FSDP2 is supported",
        "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": "only for types with a `bias` argument",
    },
    "test_decoder_models.TestDecoderModels": {
        "test_prompt_learning_with_gradient_checkpointing": "only for prompt learning",
        "test_set_requires_grad_prompt_learning_raises": "only for prompt learning",
    },
    "test_seq_classifier.TestSequenceClassificationModels": {
        "test_modules_to_save_correctly_set": RUN,
        "test_forward_with_labels": RUN,
        "test_prompt_learning_forward_with_inputs_embeds": "only for prompt learning",
    },
    "test_config.TestPeftConfig": {
        "test_methods": ONCE,
        "test_valid_task_type": [{"valid_task_type": task} for task in ("CAUSAL_LM", *TASKS, "SEQ_2_SEQ_LM", None)],
        "test_invalid_task_type": ONCE,
        "test_from_pretrained": "downloads a LoRA adapter",
        "test_save_pretrained": ONCE,
        "test_from_json_file": ONCE,
        "test_to_dict": ONCE,
        "test_from_pretrained_cache_dir": "downloads a LoRA adapter",
        "test_save_pretrained_with_runtime_config": "downloads a LoRA adapter",
        "test_set_attributes": ONCE,
        "test_config_copy": ONCE,
        "test_config_deepcopy": ONCE,
        "test_config_pickle_roundtrip": ONCE,
        "test_save_pretrained_with_target_modules": "only for types that turn target_modules into a set",
        "test_from_pretrained_forward_compatible": ONCE,
        "test_from_pretrained_forward_compatible_load_from_peft_config": ONCE,
        "test_from_pretrained_sanity_check": ONCE,
        "test_config_layers_to_transform_index_zero": "only for layers_to_transform",
        "test_peft_version_is_stored": [{"version": version} for version in ("0.10", "0.17.0", "1")],
        "test_peft_version_is_dev_version": ONCE,
        "test_peft_version_is_dev_version_but_commit_hash_cannot_be_determined": ONCE,
        "test_peft_version_warn_when_commit_hash_errors": ONCE,
    },
}
# Classes and modules whose generic tests are not for this method at all.
OTHER_CLASSES = {
    "test_feature_extraction_models.TestPeftFeatureExtractionModel": "run as FEATURE_EXTRACTION: calls COMMON only",
    "test_token_classification_qa.TestTokenClassificationModels": "run as TOKEN_CLS: calls COMMON only",
    "test_token_classification_qa.TestQuestionAnsweringModels": "run as QUESTION_ANS: calls COMMON only",
    "test_encoder_decoder_models.TestEncoderDecoderModels": "two stacks of blocks",
    "test_initialization.TestLoraInitialization": "only for LoRA",
    "test_lora_variants.TestLoraVariants": "only for LoRA",
    "test_low_level_api.TestLowLevelFunctional": "only for types that share state between layers",
    "test_low_level_api.TestPeftStateDict": "only for LoRA and LoKr, by their prefix",
    "test_other.TestAdapterTargeting": "builds a model without blocks",
    "test_quantization.TestQuantization": "downloads opt-125m",
    "test_stablediffusion.TestStableDiffusionModel": "image models",
    "test_target_parameters.TestDecoderModelsTargetParameters": "only for target_parameters; calls COMMON only",
}


def left_early(code, call) -> str | None:
    """Run `call`; return why PEFT's function with this `code` was left before its end, None if it was not."""
    left: list[str] = []

    def each_line(frame, event, arg):
        line = linecache.getline(code.co_filename, frame.f_lineno).strip()
        if event == "line" and line.startswith("return"):
            left.append(line)
        return each_line

    tracer = sys.gettrace()
    sys.settrace(lambda frame, event, arg: each_line if frame.f_code is code else None)
    try:
        call()
    except pytest.skip.Exception as skipped:
        return f"skip: {skipped}"
    finally:
        sys.settrace(tracer)
    return left[0] if left else None


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """family -> a local folder with a tiny model. PEFT skips tests by what a model's name contains ("gpt2", "gemma"),
    so the folders are named by number."""
    made = {}
    for number, family in enumerate((*MODEL_TYPES, *TASKS)):
        config = transformers.AutoConfig.for_model(
            "qwen3" if family in TASKS else family,
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,  # _test_safe_merge writes the state dict with safetensors, which refuses ties
        )
        torch.manual_seed(0)
        auto_class = TASKS[family][1] if family in TASKS else "AutoModelForCausalLM"
        model = getattr(transformers, auto_class).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        made[family] = str(tmp_path_factory.mktemp("models") / f"model{number}")
        model.save_pretrained(made[family])
    return made


@pytest.fixture
def toy(monkeypatch):
    """PEFT's toy model of one stack of blocks, where PEFT's tests say `MLP`."""
    from .toy import Toy

    monkeypatch.setattr(load("test_custom_models"), "MLP", Toy)
    return Toy


def class_named(name: str) -> type:
    module, _, cls = name.partition(".")
    return getattr(load(module), cls)


def end_of(method: str, family: str, layer, arguments: dict[str, Any], folders, monkeypatch) -> str | None:
    """Run one method of PeftCommonTester; None if it ran to its end."""
    name = TASKS[family][0] if family in TASKS else "test_decoder_models.TestDecoderModels"
    tester = class_named("test_custom_models.TestPeftCustomModel" if family == "toy" else name)()
    task_type = family if family in TASKS else "CAUSAL_LM"
    kwargs = {"layer": layer, "init_weights": False} | ({} if family == "toy" else {"task_type": task_type})
    if method in GOES_BY:
        monkeypatch.setattr(load("testing_common"), GOES_BY[method], SingleLayerConfig)
    torch.manual_seed(0)
    test = getattr(tester, method)
    given = {"model_id": folders.get(family, "MLP"), "config_cls": SingleLayerConfig, "config_kwargs": kwargs}
    return left_early(test.__func__.__code__, lambda: test(**given, **arguments))


def common_cases(deselected: bool) -> list:
    cases = []
    for method in dict.fromkeys((*COMMON, *DESELECTED)):
        families = DESELECTED.get(method, ((),))[0]
        for family in FAMILIES:
            for layer in LAYERS:
                for arguments in COMMON.get(method, ONCE):
                    if (family in families) == deselected:
                        values = [method, family, *map(str, [layer, *arguments.values()])]
                        cases.append(pytest.param(method, family, layer, arguments, id="-".join(values)))
    return cases


@pytest.mark.parametrize("method, family, layer, arguments", common_cases(deselected=False))
def test_common(method, family, layer, arguments, folders, toy, monkeypatch, record_property):
    record_property("peft_suite", family)
    assert end_of(method, family, layer, arguments, folders, monkeypatch) is None


@pytest.mark.parametrize("method, family, layer, arguments", common_cases(deselected=True))
def test_deselected(method, family, layer, arguments, folders, toy, monkeypatch, record_property):
    record_property("peft_suite", f"{family} deselected")
    _, reason, words = DESELECTED[method]
    try:
        end = end_of(method, family, layer, arguments, folders, monkeypatch)
    except (AttributeError, KeyError, AssertionError, ValueError) as error:
        end = str(error)
    assert end is not None and re.search(words, end), f"{reason!r} is no longer why PEFT leaves it: {end}"


OTHER_CASES = [
    pytest.param(name, test, arguments, id="-".join([test, *map(str, arguments.values())]))
    for name, tests in OTHERS.items()
    for test, runs in tests.items()
    if not isinstance(runs, str)
    for arguments in runs
]


@pytest.mark.parametrize("name, test, arguments", OTHER_CASES)
def test_other(name, test, arguments, request, folders, toy, record_property):
    """The tests of PEFT's test classes that take a config, with what their parameters ask for."""
    family = "SEQ_CLS" if "SequenceClassification" in name else "toy"
    record_property("peft_suite", "configs" if "TestPeftConfig" in name else family)
    method = getattr(class_named(name)(), test)
    wanted = inspect.signature(method).parameters
    kwargs = {"layer": arguments.get("layer", 0)} | ({"task_type": family} if family in TASKS else {})
    # Tests with target_modules and no layer name modules of blocks 0, 1 and 2.
    by_modules = functools.partial(SingleLayerConfig, layer=[0, 1, 2])
    given = {
        "test_name": test,
        "tuner_method": "single_layer",
        "model_id": folders.get(family, "MLP"),
        "config_cls": SingleLayerConfig if any("kwargs" in parameter for parameter in wanted) else by_modules,
        "config_kwargs": kwargs,
        "config_class": SingleLayerConfig,
        "mandatory_kwargs": kwargs,
    }
    given |= {
        n: SingleLayerConfig(**v) if n.startswith("config") and "kwargs" not in n else v for n, v in arguments.items()
    }
    given |= {n: request.getfixturevalue(n) for n in wanted if n in ("tmp_path", "monkeypatch", "recwarn")}
    torch.manual_seed(0)
    assert left_early(method.__func__.__code__, lambda: method(**{n: given[n] for n in wanted})) is None


def test_every_common_test_is_listed():
    methods = {name for name in dir(class_named("testing_common.PeftCommonTester")) if name.startswith("_test_")}
    assert methods == {*COMMON, *DESELECTED, *HELPERS}


def test_every_generic_test_is_listed():
    """Generic: takes a config class (in TestMixedAdapterBatches, configs), and does not only call a common test."""
    found: dict[str, set[str]] = {}
    for path in sorted(fetch().glob("test_*.py")):
        for cls in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            for test in cls.body:
                if isinstance(test, ast.FunctionDef) and test.name.startswith("test"):
                    name = f"{path.stem}.{cls.name}"
                    taken = {argument.arg for argument in test.args.args}
                    if taken & {"config_cls", "config_class"} or (name in OTHERS and taken & {"config0", "config"}):
                        calls = "self._test_" in ast.unparse(test)
                        found.setdefault(name, set()).update(set() if calls else {test.name})
    assert found.keys() == OTHERS.keys() | OTHER_CLASSES.keys()
    assert {name: found[name] for name in OTHERS} == {name: set(tests) for name, tests in OTHERS.items()}
