"""What the package relies on inside other libraries, in one table, with the check that each is still there.

A seam is a private name, an overridden method, or behaviour that no documentation promises. The module that uses seams
calls `check(__name__)` before it does. Where a library has moved a seam, the package refuses in one line
instead of training the wrong thing. `tests/test_seams.py` also looks for the texts in the libraries' sources.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

# The lowest and the highest version of each library that the core of the tests passed with (`make compat`).
TESTED = {
    "accelerate": ("1.10.1", "1.15.0"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "huggingface_hub": ("1.5.0", "2.4.0"),
    "peft": ("0.21.0", "0.21.2"),
    "torch": ("2.6.0", "2.14.1"),
    "transformers": ("5.13.0", "5.23.0"),
    "trl": ("1.14.0", "1.16.0"),
}


@dataclass(frozen=True)
class Seam:
    """One thing in another library.

    Attributes:
        path: module and name in it, "peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING".
        why: what it is needed for.
        takes: names of parameters that it must have.
        exactly: whether it must have no others: it is overridden with these parameters.
        says: texts in its source, for what a signature does not show. Only the tests look for them.
    """

    path: str
    why: str
    takes: tuple[str, ...] = ()
    exactly: bool = False
    says: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        return self.path.partition(":")[0].partition(".")[0]

    def find(self) -> Any:
        """The object.

        Raises:
            ImportError, AttributeError: it is not there.
        """
        module, _, name = self.path.partition(":")
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))

    def problem(self) -> str | None:
        """What is wrong with the seam in the installed library, or None."""
        try:
            found = self.find()
        except (ImportError, AttributeError):
            return "is not there"
        if not self.takes:
            return None
        parameters = tuple(name for name in inspect.signature(found).parameters if name != "self")
        if missing := [name for name in self.takes if name not in parameters]:
            return f"does not take {', '.join(missing)}"
        if self.exactly and parameters != self.takes:
            return f"takes {', '.join(parameters)} instead of {', '.join(self.takes)}"
        return None


def check(user: str) -> None:
    """Raise ImportError, in one line, if a seam that the module `user` relies on has moved.

    >>> check("peft_onelayer.tuner")
    """
    for seam in SEAMS[user]:
        if problem := seam.problem():
            lowest, highest = TESTED[seam.library]
            raise ImportError(
                f"{user} needs {seam.path} ({seam.why}), which {problem} in {seam.library} {version(seam.library)}; "
                f"{seam.library} {lowest} to {highest} have it."
            )


_TUNER = "peft.tuners.tuners_utils:BaseTuner."
_LAYER = "peft.tuners.tuners_utils:BaseTunerLayer."
_GRPO = "trl.trainer.grpo_trainer:GRPOTrainer."
_VLLM = "trl.generation.vllm_generation:VLLMGeneration."
_CHAT = "trl.chat_template_utils:"
_SDPO = "trl.experimental.sdpo:SDPOTrainer"
_SDFT = "trl.experimental.sdft:SDFTTrainer"
_CREATE = ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name")
_REMAP = ("model", "config", "adapter_name", "state_dict")
_UNLOAD = ("merge", "progressbar", "safe_merge", "adapter_names")
_RENAME = ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict")
_TEACHER = ("self._use_peft_ema_teacher_adapter()", "self._setup_teacher_model()")

SEAMS: dict[str, tuple[Seam, ...]] = {
    "peft_onelayer.tuner": (
        Seam("peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING", "to enter a method that is not in PEFT's own enum"),
        Seam("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING", "to enter the method"),
        Seam("peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING", "to enter the method"),
        Seam(_TUNER + "inject_adapter", "a config of the model's own", ("model", "adapter_name")),
        Seam(_TUNER + "_prepare_adapter_config", "to resolve the blocks", ("peft_config", "model_config"), True),
        Seam(_TUNER + "_check_target_module_exists", "to choose modules", ("peft_config", "key"), True),
        Seam(_TUNER + "_prepare_model", "to cut the graph", ("peft_config", "model"), True),
        Seam(_TUNER + "_create_and_replace", "to wrap modules", _CREATE, True),
        Seam(_TUNER + "_replace_module", "to unload", ("parent", "child_name", "new_module", "child"), True),
        Seam(_TUNER + "_cast_adapter_dtype", "float32 masters", ("adapter_name", "autocast_adapter_dtype"), True),
        Seam(_TUNER + "_unload_and_optionally_merge", "to merge", _UNLOAD, True),
        Seam(_TUNER + "_get_adapter_state_dict", "to save", ("model", "config", "adapter_name", "state_dict")),
        Seam(_TUNER + "_remap_adapter_state_dict_for_load", "to load, the sparse encoding too", _REMAP, True),
        Seam(_TUNER + "_remove_adapter_name_from_key", "to load", ("key", "adapter_name")),
        Seam(_LAYER + "set_adapter", "several adapters", ("adapter_names", "inference_mode"), True),
        Seam(_LAYER + "enable_adapters", "to switch adapters off", ("enabled",), True),
        Seam(_LAYER + "set_requires_grad", "adapters that stay frozen", ("adapter_names", "requires_grad")),
        Seam(_LAYER + "_move_adapter_to_device_of_base_layer", "float32 masters", ("adapter_name", "device"), True),
        Seam("peft.tuners.tuners_utils:check_adapters_to_merge", "to merge", ("module", "adapter_names")),
        Seam("peft.peft_model:PeftModel._enable_peft_forward_hooks", "several adapters in one batch"),
        Seam("peft.utils.constants:INCLUDE_LINEAR_LAYERS_SHORTHAND", "target_modules"),
        Seam("peft.utils.constants:SEQ_CLS_HEAD_NAMES", "the graph cut"),
        Seam("peft.utils.other:AuxiliaryTrainingWrapper", "modules_to_save"),
        Seam(
            "peft.utils.other:AuxiliaryTrainingWrapper.adapter_state_dict_load_map",
            "to load modules_to_save",
            ("adapter_name",),
        ),
        Seam(
            "peft.peft_model:PeftModel.save_pretrained",
            "to note which embeddings were saved",
            says=("safe_save_file(", "peft_config.save_pretrained(output_dir, auto_mapping_dict="),
        ),
        Seam("peft.config:PeftConfigMixin.save_pretrained", "to note which embeddings were saved", ("save_directory",)),
        Seam("peft.utils.integrations:get_bnb_param_type", "quantized bases", ("param",)),
        Seam("peft.utils.integrations:dequantize_bnb_weight", "quantized bases", ("weight", "state")),
        Seam(
            "transformers.modeling_layers:GradientCheckpointingLayer",
            "the graph cut",
            says=("self._gradient_checkpointing_func(partial(",),
        ),
        Seam(
            "transformers.modeling_utils:PreTrainedModel.disable_input_require_grads",
            "the graph cut",
            says=("_require_grads_hooks",),
        ),
        Seam(
            "transformers.modeling_utils:PreTrainedModel._load_pretrained_model",
            "the sparse encoding in transformers' load_adapter",
            ("model", "state_dict", "checkpoint_files"),
        ),
        Seam(
            "transformers.cache_utils:DynamicLayer.batch_select_indices", "several adapters in one batch", ("indices",)
        ),
        Seam("transformers.cache_utils:DynamicSlidingWindowLayer", "several adapters in one batch"),
        Seam("transformers.pytorch_utils:Conv1D", "the linear layers of GPT-2"),
        Seam("torch.nn:Module._apply", "float32 masters", ("fn", "recurse"), True),
        Seam(
            "torch.nn:Module.__init__",
            "to find the graph cut and FSDP2 by their hooks",
            says=("_forward_pre_hooks", "_load_state_dict_post_hooks"),
        ),
        Seam("torch.utils.hooks:RemovableHandle.__init__", "copies of a model", says=("self.hooks_dict_ref",)),
        Seam("torch.optim.optimizer:register_optimizer_step_pre_hook", "the checks at each step"),
        Seam(
            "torch.nn:Module._replicate_for_data_parallel",
            "replicas of nn.DataParallel",
            says=("replica._parameters = {}",),
        ),
        Seam("torch.nn.parallel.replicate:replicate", "replicas of nn.DataParallel", says=("_former_parameters[key]",)),
        Seam("torch.nn.modules.rnn:RNNBase", "a recurrent module's list of its parameters"),
        Seam("torch._C:DisableTorchFunctionSubclass", "writes to rounded weights"),
        Seam(
            "transformers.modeling_utils:PreTrainedModel._init_weights",
            "the initialisation of a wrapped module",
            ("module",),
        ),
        Seam("torch.distributed.fsdp:FSDPModule", "FSDP2"),
        Seam(
            "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.__init__",
            "to tell what FSDP2 holds",
            says=("register_load_state_dict_post_hook(",),
        ),
        Seam("torch.distributed.tensor:DTensor", "FSDP2"),
    ),
    "peft_onelayer.tuner.sharding": (Seam("deepspeed.zero:GatheredParameters", "ZeRO-3", ("params", "modifier_rank")),),
    "peft_onelayer.adapter.checkpoint": (
        Seam("transformers.conversion_mapping:get_model_conversion_mapping", "names of stored tensors", ("model",)),
        Seam("transformers.core_model_loading:rename_source_key", "names of stored tensors", _RENAME),
        Seam("transformers.core_model_loading:WeightConverter", "names of stored tensors"),
        Seam("transformers.core_model_loading:WeightRenaming", "names of stored tensors"),
        Seam("transformers.initialization:no_init_weights", "a model without weights"),
        Seam(
            "transformers.modeling_utils:PreTrainedModel.post_init",
            "names of tied tensors",
            says=("self.all_tied_weights_keys = ",),
        ),
        Seam("transformers.initialization:meta_device_safe_creation_ops", "a model without weights"),
    ),
    "peft_onelayer.adapter.fusion": (
        Seam("peft.utils.merge_utils:prune", "to combine adapters", ("tensor", "density", "method")),
        Seam("peft.utils.merge_utils:task_arithmetic", "to combine adapters", ("task_tensors", "weights")),
        Seam("peft.utils.merge_utils:calculate_majority_sign_mask", "to combine adapters", ("tensor",)),
        Seam("peft.utils.merge_utils:disjoint_merge", "to combine adapters", ("task_tensors", "majority_sign_mask")),
    ),
    "peft_onelayer.runs.models": (
        Seam(
            "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            "to tell a causal language model by its config",
        ),
    ),
    "peft_onelayer.rollouts.sampling": (
        Seam(_CHAT + "parse_response", "tool calls", ("tokenizer", "ids", "prefix")),
        Seam(_CHAT + "add_response_schema", "tool calls"),
        Seam(_CHAT + "get_training_chat_template", "dialogues of several turns"),
        Seam(_CHAT + "is_chat_template_prefix_preserving", "dialogues of several turns"),
        Seam(_CHAT + "supports_tool_calling", "tool calls"),
        Seam(
            "transformers.tokenization_utils_base:PreTrainedTokenizerBase.__init__",
            "tool calls",
            says=("self.response_template = ",),
        ),
    ),
    "peft_onelayer.rl.rows": (
        Seam(
            _GRPO + "_calculate_rewards",
            "columns reach the reward by name",
            says=("reward_kwargs = {key: [example[key] for example in inputs] for key in keys}",),
        ),
        Seam(
            _GRPO + "_generate_and_score_completions",
            "environments are reset with the row",
            says=("environment.reset(**reset_kwargs)",),
        ),
        Seam(_SDPO, "a column that the trainer reads", says=('example.get("privileged_context")',)),
    ),
    "peft_onelayer.rl.sampling": (
        Seam(
            _GRPO + "__init__",
            "how a run samples",
            says=("generation_kwargs.update(args.generation_kwargs)", '"top_k": self.top_k,'),
        ),
        Seam("trl.experimental.a2po:A2POTrainer", "how a run samples", says=("add_special_tokens=False,",)),
        Seam(
            "trl.experimental.online_dpo:OnlineDPOTrainer", "how a run samples", says=("maybe_apply_chat_template(x",)
        ),
        Seam(_SDPO, "how a run samples", says=("ids[-self.max_prompt_length :]",)),
    ),
    "peft_onelayer.probe.updates": (
        Seam("trl.trainer.utils:selective_log_softmax", "log-probabilities", ("logits", "index")),
    ),
    "peft_onelayer.rl.gigpo": (
        Seam(_GRPO + "__init__", "the environments", says=("self._environment_pool[",)),
        Seam(_GRPO + "_generate_and_score_completions", "the advantages", ("inputs",), True),
        Seam(_GRPO + "_generate_single_turn", "the state before each turn"),
        Seam(_GRPO + "_generate", "the state before the first turn", says=("self._generate_single_turn(",)),
        Seam(
            _GRPO + "_tool_call_loop",
            "which tokens are of which turn",
            says=("self._generate_single_turn(", "return tool_mask, "),
        ),
        Seam(_GRPO + "_compute_loss", "advantages of (B, T)", says=("if advantages.dim() == 1:",)),
    ),
    "peft_onelayer.runs.shapes": (
        Seam("torch._subclasses.fake_tensor:FakeTensorMode", "shapes without numbers", ("allow_non_fake_inputs",)),
        Seam("torch.utils._python_dispatch:TorchDispatchMode", "to see every tensor that is made"),
        Seam("torch.utils._pytree:tree_map_only", "to see every tensor that is made"),
    ),
    "peft_onelayer.rl.cpu_products": (
        Seam("torch.library:Library.impl", "kernels of our own", ("op_name", "fn", "dispatch_key", "with_keyset")),
        Seam("torch.library:Library._destroy", "torch's kernels again"),
        Seam("torch._C:DisableTorchFunctionSubclass", "products of rounded weights"),
    ),
    "peft_onelayer.rl.prefix": (Seam("torch.nn.modules.dropout:_DropoutNd", "to know that a pass is random"),),
    "peft_onelayer.rl.packing": (
        *(
            Seam(
                f"trl.trainer.{name.lower()}_trainer:{name}Trainer._prepare_inputs",
                "to keep the rows of a prompt in one pass",
                ("generation_batch",),
                says=(
                    "= shuffle_sequence_dict(generation_batch)",
                    "self._buffered_inputs = [",
                    "= self._buffered_inputs[self._step % self.args.steps_per_generation]",
                ),
            )
            for name in ("GRPO", "RLOO")
        ),
        Seam(
            "transformers.masking_utils:_preprocess_mask_arguments",
            "a mask of every pair of positions is taken as it is",
            ("attention_mask",),
            says=("len(attention_mask.shape) == 4",),
        ),
    ),
    "peft_onelayer.sweep.lockstep": (
        Seam("accelerate.state:PartialState", "the state of one run among several", says=("_shared_state",)),
        Seam("accelerate.state:AcceleratorState", "the state of one run among several", says=("_shared_state",)),
        Seam("accelerate.state:GradientState", "the state of one run among several", says=("_shared_state",)),
    ),
    "peft_onelayer.tuner.prompts": (
        Seam("transformers.cache_utils:DynamicLayer.batch_select_indices", "one pass of equal prompts", ("indices",)),
    ),
    "peft_onelayer.rl.sync": (
        Seam(
            _VLLM + "sync_weights",
            "to send the trained block alone",
            says=(
                'self.llm.wake_up(tags=["weights"])',
                "self._llm_weights_sleeping = False",
                "self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights([(name, param)])",
                "self.vllm_client.reset_prefix_cache()",
            ),
        ),
        Seam(
            _VLLM + "generate",
            "to know what an engine has forgotten",
            says=("self.llm.sleep(level=2)", "self._llm_weights_sleeping = True", "self.sync_weights()"),
        ),
        Seam(_VLLM + "__init__", "to find the engine", ("model", "mode", "tensor_parallel_size", "enable_sleep_mode")),
        Seam(
            "trl.generation.vllm_client:VLLMClient.update_named_params",
            "to send a server some tensors",
            ("metadata", "named_params"),
        ),
        Seam(
            "trl.generation.vllm_client:VLLMClient.init_communicator",
            "to send a server entries",
            says=("self.communicator = open_trainer_endpoint(init_info)",),
        ),
    ),
    "peft_onelayer.rl.transfer": (
        Seam(
            "trl.experimental.async_grpo.weight_transfer:WeightTransferClient.send_weights",
            "to send a server some tensors",
            ("iterator",),
            says=("self.vllm.update_weights(self._weight_update_info,", "group=self.model_update_group,"),
        ),
        Seam(
            "trl.experimental.async_grpo.async_grpo_trainer:AsyncGRPOTrainer._sync_weight_merged",
            "to take the place of its transfer",
            says=(
                "self.weight_transfer.pause()",
                "self.weight_transfer.send_weights(self._streaming_iter())",
                "self.weight_transfer.resume()",
            ),
        ),
    ),
    "peft_onelayer.rl.entropy": (
        Seam(
            _GRPO + "_compute_loss",
            "to divide by the selected tokens",
            ("model", "inputs"),
            True,
            says=("self.get_high_entropy_mask(",),
        ),
        Seam(_GRPO + "get_high_entropy_mask", "the selected tokens", ("entropies", "mask", "threshold"), True),
    ),
    "peft_onelayer.rl.ema": (
        Seam(_SDPO + "._use_peft_ema_teacher_adapter", "a teacher that follows the student"),
        Seam(_SDPO + "._setup_teacher_model", "a teacher that follows the student"),
        Seam(_SDPO, "a teacher that follows the student", says=_TEACHER),
        Seam(_SDFT + "._use_peft_ema_teacher_adapter", "a teacher that follows the student"),
        Seam(_SDFT + "._setup_teacher_model", "a teacher that follows the student"),
        Seam(_SDFT, "a teacher that follows the student", says=_TEACHER),
    ),
    "peft_onelayer.records.hub_errors": (
        Seam(
            "huggingface_hub._commit_api:_upload_lfs_files", "to say why a push failed", says=("raise RuntimeError(",)
        ),
        Seam("huggingface_hub._commit_api:_upload_xet_files", "to tell Xet's errors", says=("hf_xet",)),
        Seam("huggingface_hub.file_download:xet_get", "to tell Xet's errors", says=("hf_xet",)),
        Seam("huggingface_hub.utils._http:_GLOBAL_CLIENT_FACTORY", "a client that does not retry in vain"),
    ),
    "onelayer_cli._hub": (
        Seam("huggingface_hub.utils._http:default_client_factory", "a client that does not wait forever"),
    ),
}
