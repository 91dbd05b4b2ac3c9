"""The tuner: puts the single-layer method into a model, by PEFT's `BaseTuner` contract."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import TaskType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_onelayer.layers import may_name, names_a_file, resolve_layers
from peft_onelayer.records.text import printable
from peft_onelayer.sparse.base import BaseRecord
from peft_onelayer.sparse.names import base_name, unwrapped

from .base import commit_hash, identify_base, is_renamed, record_stage
from .config import SingleLayerConfig
from .graph_cut import GraphCut, installed_graph_cut, installed_graph_cuts
from .layer import SingleLayerLayer
from .loading import intercept_transformers, loadable_state_dict, masked_tensors, stop_intercepting
from .mask import Mask
from .merging import MergingTuner
from .mixed_batch import row_adapters
from .rounded import keeping_rounded
from .stack import DecoderStack, find_decoder_stack, layer_kinds
from .targets import check_blocks, is_name, target_names, targetable
from .threads import no_switch_by_others
from .weights import AdapterWeights

# The modules that PeftModelForTokenClassification and PeftModelForQuestionAnswering add to `modules_to_save` of the
# config they were given, after the model has been wrapped.
HEADS = {TaskType.TOKEN_CLS: ["classifier", "score"], TaskType.QUESTION_ANS: ["qa_outputs"]}
# The older name is the only one before transformers 5.23, and deprecated from there.
CHECKPOINTING_ENABLE = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if name in vars(PreTrainedModel)
)


class SingleLayerModel(MergingTuner):
    """Trains one transformer block (or a few) of a model in full and freezes everything else.

    Every module of the chosen block that has parameters of its own is wrapped by a [`SingleLayerLayer`] which keeps a
    float32 copy of them. Created by `peft.get_peft_model(model, SingleLayerConfig(layer=14))`.

    Args:
        model (`torch.nn.Module`): a transformers model with one stack of blocks, or a plain module with one ModuleList.
        config ([`SingleLayerConfig`]): the configuration.
        adapter_name (`str`): the name of the adapter, defaults to "default".

    Raises:
        ValueError: no such block, no or several stacks of blocks, a block that cannot be wrapped module by module, or
            a model that already carries another PEFT method. Nothing has been changed then.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_onelayer import SingleLayerConfig
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        >>> model = get_peft_model(Qwen3ForCausalLM(config), SingleLayerConfig(layer="middle"))
        >>> model.peft_config["default"].layer_indices
        [2]

        ```
    """

    prefix: str = "single_layer_"
    tuner_layer_cls = SingleLayerLayer
    target_module_mapping: dict[str, list[str]] = {}
    _expression: str | None = None  # in `target_modules`, while PEFT must not see it

    def __init__(
        self, model: nn.Module, peft_config: SingleLayerConfig | dict[str, SingleLayerConfig], *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(peft_config, dict):  # a PeftModel's
            peft_config = {name: _with_heads(config) for name, config in peft_config.items()}
        configs = getattr(model, "peft_config", None)  # of adapters already injected; PEFT adds to it before any check
        before = dict(configs or {})
        try:
            super().__init__(model, peft_config, *args, **kwargs)
        except Exception:
            if configs is not None:
                configs.clear()
                configs.update(before)
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See `BaseTuner.inject_adapter`. The model keeps a copy of the config and resolves that one."""
        self.peft_config[adapter_name] = config = copy.deepcopy(self.peft_config[adapter_name])
        if config.modules_to_save is not None:  # PEFT lists the heads again for each model that uses a config object
            config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
        self._expression, targets = None, config.target_modules
        if isinstance(targets, str) and not is_name(targets) and targets.lower() != ALL_LINEAR:
            # PEFT's `_check_tied_modules` would match it by `re`, without a limit, before `_prepare_adapter_config`.
            self._expression, config.target_modules = targets, None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        stop_intercepting(self.model)
        intercept_transformers(self.model, adapter_name)

    def _prepare_adapter_config(self, peft_config: SingleLayerConfig, model_config: dict) -> SingleLayerConfig:
        """Resolve `layer` against the model and refuse what cannot be trained, before anything is changed."""
        model = self.model
        if self._expression is not None:
            peft_config.target_modules = self._expression
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, SingleLayerLayer):
                raise ValueError(
                    f"the model already carries another PEFT method ({type(module).__name__} at {name}); "
                    "merge or unload it before wrapping one block."
                )
        if isinstance(model, PeftModel):
            raise ValueError(
                "the model is wrapped by PEFT already; for several blocks give them together, as layer=[7, 8], and for "
                "another adapter of the same model call its add_adapter(NAME, SingleLayerConfig(...))."
            )
        stack = find_decoder_stack(model, peft_config.layers_pattern)
        num_layers = len(stack.blocks)
        if peft_config.num_layers not in (None, num_layers):
            raise ValueError(
                f"this adapter was made for a model of {printable(peft_config.num_layers)} blocks and this one has "
                f"{num_layers}: it belongs to another base model ({printable(peft_config.base_model_name_or_path)})."
            )
        layer: Any = peft_config.layer
        asked = peft_config.layer_indices or layer
        indices = resolve_layers(asked, num_layers, layer_kinds(model))
        if peft_config.layer_indices and not may_name(layer, indices, num_layers):
            raise ValueError(
                f"the configuration has layer={printable(layer)} and layer_indices={indices}, to which its "
                "layer was resolved before; for another block set layer_indices=None too, or write a new configuration."
            )
        if names_a_file(asked):
            peft_config.layer = indices
        check_blocks(model, stack, indices, peft_config)
        peft_config.layer_indices, peft_config.num_layers = indices, num_layers
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:  # PEFT would name those of the whole model
            peft_config.target_modules = [
                unwrapped(path)
                for _, path, module in targetable(stack, indices)
                if isinstance(module, (nn.Linear, Conv1D))
            ]
        self._targets = target_names(stack, indices, peft_config)
        parameters = self._restrict(stack, peft_config)
        if isinstance(peft_config.target_modules, str) and not is_name(peft_config.target_modules):
            peft_config.target_modules = sorted(self._targets)  # what is saved holds names, no expression to be matched
        if (
            peft_config.trained_on is not None and not peft_config.base_is_recorded
        ):  # a file's, which is about to be loaded
            peft_config.saved_embeddings = peft_config.saved_embeddings or []
        identify_base(model, peft_config, self._targets, parameters)
        if is_renamed(model):
            peft_config.base_model_name_or_path = peft_config.revision = None
        elif peft_config.revision is None:
            peft_config.revision = commit_hash(model)
        return peft_config

    def _restrict(self, stack: DecoderStack, config: SingleLayerConfig) -> set[str] | None:
        """Leave of the modules to train those that have an entry of the mask.

        Returns:
            The names in the base of the parameters that train; None without a mask, for all.
        """
        if config.mask is None:
            return None
        if isinstance(config.mask, (str, os.PathLike)):  # set on the configuration of an adapter to be trained further
            config.entries = Mask.read(config.mask)
        if config.entries is None:  # an adapter that is about to be loaded, whose file may hold the mask
            names = set(BaseRecord.from_json(config.trained_on).block)
        else:
            config.entries = config.entries.inside(self.model, stack.name, config.layer_indices or [], self._targets)
            config.mask = config.entries.record()
            names = set(config.entries.tensors)
        self._targets &= {name.rpartition(".")[0] for name in names}
        return names

    def _trained(self, config: SingleLayerConfig, module: str) -> dict[str, torch.Tensor | None] | None:
        """Which parameters of a module train, as `AdapterWeights.update_layer` takes it."""
        if config.mask is None:
            return None
        if config.entries is not None:
            return dict(config.entries.of_module(base_name(module)))
        names = BaseRecord.from_json(config.trained_on).block
        own = (name.rpartition(".") for name in names)
        return {parameter: None for path, _, parameter in own if path == base_name(module)}

    def _check_target_module_exists(self, peft_config: SingleLayerConfig, key: str) -> bool:
        # PEFT does not look inside a module that an earlier adapter wrapped, so that one answers for what is in it.
        return key in self._targets or (
            isinstance(self.model.get_submodule(key), SingleLayerLayer)
            and any(name.startswith(f"{key}.") for name in self._targets)
        )

    def _prepare_model(self, peft_config: SingleLayerConfig, model: nn.Module) -> None:
        stack = find_decoder_stack(model, peft_config.layers_pattern)
        if installed_graph_cut(stack) is None:
            GraphCut(model, stack)

    def _create_and_replace(
        self,
        peft_config: SingleLayerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SingleLayerLayer):
            if current_key in self._targets:
                target.update_layer(adapter_name, peft_config, self._trained(peft_config, current_key))
            self._inject_below(peft_config, adapter_name, target.base_layer, current_key)
            return
        layer = SingleLayerLayer(target, adapter_name, peft_config, self._trained(peft_config, current_key))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        # A composite module is wrapped before its children, which then belong to the wrapped module, not the wrapper.
        owner = parent.get_base_layer() if isinstance(parent, SingleLayerLayer) else parent
        setattr(owner, target_name, layer)

    def _inject_below(self, peft_config: SingleLayerConfig, adapter_name: str, module: nn.Module, key: str) -> None:
        """Inject into what lies inside `module`, which an earlier adapter wrapped."""
        for name, child in list(module.named_children()):
            below = f"{key}.{name}"
            if isinstance(child, SingleLayerLayer) or below in self._targets:
                self._create_and_replace(peft_config, adapter_name, child, name, module, below)
            if not isinstance(child, SingleLayerLayer):
                self._inject_below(peft_config, adapter_name, child, below)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Masters are made in float32. PEFT's autocast_adapter_dtype=False asks for the base's dtype instead."""
        if autocast_adapter_dtype:
            return
        config = self.peft_config[adapter_name]
        layers = _layers_with(self, [adapter_name]).values()
        for layer in layers:
            masters = layer.masters(adapter_name)
            origins = layer._base_weights()
            narrowed = any(origins[name].dtype != master.dtype for name, master in masters.items())
            if narrowed and config.master_dtype == "float32" and not config.inference_mode:
                warnings.warn(
                    "autocast_adapter_dtype=False keeps the trained block in the base model's dtype: without float32 "
                    "master weights, small RL updates are rounded away, unless the optimizer keeps its own. (TRL asks "
                    "for this under ZeRO-3, where DeepSpeed's bf16 optimizer does; what is saved is rounded.)",
                    stacklevel=2,
                )
                break
        for layer in layers:
            layer.to_base_dtype(adapter_name)

    def _init_weights(self, module: nn.Module) -> None:
        """transformers' own, which goes by a module's class; of a wrapped module it initialises what is in effect."""
        self.model._init_weights(module.in_effect() if isinstance(module, SingleLayerLayer) else module)

    def enable_input_require_grads(self) -> None:
        """As transformers' own, which hooks the embeddings so that their output requires gradients, with a hook that
        does nothing under torch.compile: it would break the graph, which is cut below the block anyway."""
        self.model.disable_input_require_grads()
        handle = self.model.get_input_embeddings().register_forward_hook(_require_gradients)
        self.model._require_grads_hooks = [handle]  # where transformers' disable_input_require_grads looks

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """transformers' own, without the hook on the embeddings that it adds."""
        getattr(self.model, CHECKPOINTING_ENABLE)(activation_checkpointing_kwargs, **kwargs)
        self.model.disable_input_require_grads()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `BaseTuner.delete_adapter`. PEFT lets each layer choose the next active adapter among its own; with
        adapters on different layers they would disagree."""
        was_active = adapter_name in self.active_adapters
        remaining = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            self.set_adapter(remaining or [min(self.peft_config)])

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter W_0 + sum_i weights_i * (W_i - W_0). It is neither active nor trainable; see `set_adapter`.

        The adapters may be on different layers; the new one is on all of them. Computed in float64 and rounded once to
        the masters' dtype, so one adapter with weight 1 is copied bit for bit.

        Args:
            adapters: names of existing adapters, each once.
            weights: one finite number for each of them.
            adapter_name: name of the new adapter.
            combination_type: "linear", the only one.

        Raises:
            ValueError: unknown, repeated or no adapters, a name that is taken, not one weight for each adapter, another
                combination type, or adapters with `modules_to_save`.
        """
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"no adapter named {', '.join(unknown)}; the model has {', '.join(self.peft_config)}.")
        if not adapters or len(set(adapters)) < len(adapters):
            raise ValueError(f"adapters={adapters!r}: name one or more adapters, each once.")
        if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights={weights!r}: give one finite number for each of {', '.join(adapters)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter named {adapter_name!r} already; delete it or use another name.")
        if combination_type != "linear":
            raise ValueError(f'combination_type={combination_type!r} is not known; expected "linear".')
        configs = [self.peft_config[name] for name in adapters]
        if any(config.modules_to_save for config in configs):
            raise ValueError("adapters with modules_to_save cannot be combined: these modules are no sum of changes.")
        layers = _layers_with(self.model, adapters)
        parts = None  # all of every block, or by their full names what at least one of the adapters has
        if any(config.target_modules is not None or config.mask is not None for config in configs):
            parts = [unwrapped(name.replace(".base_layer", "")) for name in layers]
        self.peft_config[adapter_name] = dataclasses.replace(
            configs[0],
            layer=sorted({index for config in configs for index in config.layer_indices}),
            target_modules=parts,
            master_dtype="float32" if any(c.master_dtype == "float32" for c in configs) else "base",
            init_weights=True,
            layer_indices=None,
            num_layers=None,
            mask=None,
            combined=None,
            encoding=None,
            trained_on=None,
            saved_embeddings=None,
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            layer.combine(dict(zip(adapters, weights, strict=True)), adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's seam for `adapter_names`, around a forward pass or `generate` (`PeftModel` has the same name)."""
        names = kwargs.pop("adapter_names", None)
        if names is None and torch.compiler.is_compiling():
            yield
            return
        rows = nullcontext() if names is None else row_adapters(self, names, args, kwargs)
        with rows, no_switch_by_others(self.model), keeping_rounded():
            yield

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        merged = [name for module in self._mergeable() for name in module.merged_adapters]
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            names = {*merged, *(self.active_adapters if adapter_names is None else adapter_names)}
            record_stage(model, (index for name in names for index in self.peft_config[name].layer_indices))
        AdapterWeights.made += 1  # there are fewer now
        stop_intercepting(model)
        for cut in installed_graph_cuts(model):
            cut.remove()
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """What is saved. See `BaseTuner._get_adapter_state_dict`; warns of an adapter that changes nothing."""
        tuned = [
            layer
            for layer in _layers_with(model, [adapter_name]).values()
            if adapter_name in layer.active_adapters  # TRL's reference adapter is saved too, and may well be the base
        ]
        if tuned and all(layer.equals_base(adapter_name) for layer in tuned):
            warnings.warn(
                f"every weight of the adapter {adapter_name!r} equals the base model's in the base's dtype: it changes "
                "nothing. It was not trained, or its updates were too small.",
                stacklevel=2,
            )
        for name, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and name != unwrapped(name):
                raise ValueError(
                    f"{unwrapped(name)} of modules_to_save lies inside a module that torch.compile has wrapped: PEFT "
                    "would save it under a name that does not load; wrap the model first and compile the PeftModel."
                )
        # PEFT's own selects by the names of modules, of which a checkpoint wrapper's are not those of the state dict.
        prefixes = tuple(
            unwrapped(f"{name}.single_layer_params.{adapter_name}.")
            for name, module in model.named_modules()
            if isinstance(module, SingleLayerLayer)
        )
        parallel = any(isinstance(module, (nn.DataParallel, DistributedDataParallel)) for module in model.modules())
        masked = masked_tensors(model, adapter_name, state_dict)
        return {
            _name_of_the_plain_model(key, parallel) + suffix: value
            for key, tensor in state_dict.items()
            if unwrapped(key).startswith(prefixes)
            for suffix, value in masked.get(key, {"": tensor}).items()
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's seam between reading a file and writing the model; see `loadable_state_dict`."""
        stop_intercepting(model)
        return loadable_state_dict(model, config, adapter_name, state_dict)


def _layers_with(model: nn.Module, adapters: list[str]) -> dict[str, SingleLayerLayer]:
    """The wrapped modules, by their names in `model`, that at least one of the adapters is on."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SingleLayerLayer) and any(adapter in module.single_layer_params for adapter in adapters)
    }


def _name_of_the_plain_model(key: str, parallel: bool) -> str:
    """A key as it is saved, also of a model of which torch.compile or data parallelism has wrapped a part."""
    key = unwrapped(key)
    return key.replace("base_model.model.module.", "base_model.model.", 1) if parallel else key


def _with_heads(config: SingleLayerConfig) -> SingleLayerConfig:
    """A copy of `config` that names the heads which PEFT adds to the one it was given; see `HEADS`."""
    own = copy.copy(config)
    if heads := HEADS.get(config.task_type, []):
        own.modules_to_save = [*(config.modules_to_save or []), *heads]
    return own


def _require_gradients(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    if not torch.compiler.is_compiling():
        output.requires_grad_()
