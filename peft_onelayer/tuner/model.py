"""The tuner: puts the single-layer method into a model, by PEFT's `BaseTuner` contract."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_onelayer.layers import resolve_layers
from peft_onelayer.records.text import printable

from . import mixed_batch
from .config import SingleLayerConfig
from .first_step import watch
from .graph_cut import GraphCut, installed_graph_cut, installed_graph_cuts
from .layer import MasterParameters, SingleLayerLayer
from .loading import forget, read_through_transformers, restore_sparse
from .stack import find_decoder_stack, text_config
from .targets import check_blocks, check_targets, matches, owns_parameters, targetable

# id of a config object -> the model that holds it: it was resolved for that one last
_holders: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class SingleLayerModel(BaseTuner):
    """Trains one transformer block (or a few) of a model in full and freezes everything else.

    Every module of the chosen block that has parameters of its own is wrapped by a [`SingleLayerLayer`] which keeps a
    float32 copy of them. Created by `peft.get_peft_model(model, SingleLayerConfig(layer=14))`.

    Args:
        model (`torch.nn.Module`): a transformers model with one stack of blocks, or a plain module with one ModuleList.
        config ([`SingleLayerConfig`]): the configuration.
        adapter_name (`str`): the name of the adapter, defaults to "default".

    Raises:
        ValueError: no such layer, no or several stacks of blocks, a block that cannot be wrapped module by module, or
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

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        configs = getattr(model, "peft_config", None)  # of adapters already injected; PEFT adds to it before any check
        before = dict(configs or {})
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            if configs is not None:
                configs.clear()
                configs.update(before)
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See `BaseTuner.inject_adapter`. Resolving works on a copy; then the model holds the caller's object, as with
        any PEFT method, with what it was resolved to. A model that held it before keeps a copy with its own values."""
        given = self.peft_config[adapter_name]
        if given.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS) and given.modules_to_save is None:
            given.modules_to_save = []  # PEFT adds the heads to the caller's list afterwards: share it with the copy
        self.peft_config[adapter_name] = own = copy.copy(given)
        if given._revision_is_recorded:
            own.revision = None
        records_revision = own.revision is None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        held = getattr(_holders.get(id(given)), "peft_config", {})
        if held is not self.peft_config:
            held.update({name: copy.copy(given) for name, config in held.items() if config is given})
        _holders[id(given)] = self.model
        given.layer_indices, given.num_layers, given._stack_name = own.layer_indices, own.num_layers, own._stack_name
        given.revision, given._revision_is_recorded = own.revision, records_revision
        self.peft_config[adapter_name] = given
        forget(self.model)
        if given.encoding is not None:
            read_through_transformers(self.model, adapter_name, self._remap_adapter_state_dict_for_load)

    def _prepare_adapter_config(self, peft_config: SingleLayerConfig, model_config: dict) -> SingleLayerConfig:
        """Resolve `layer` against the model and refuse what cannot be trained, before anything is changed."""
        model = self.model
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, SingleLayerLayer):
                raise ValueError(
                    f"the model already carries another PEFT method ({type(module).__name__} at {name}); "
                    "merge or unload it before wrapping one layer."
                )
        stack = find_decoder_stack(model, peft_config.layers_pattern)
        num_layers = len(stack.blocks)
        if peft_config._saved_num_layers not in (None, num_layers):
            raise ValueError(
                f"this adapter was made for a model of {printable(peft_config._saved_num_layers)} layers and this one "
                f"has {num_layers}: it belongs to another base model ({printable(peft_config.base_model_name_or_path)})."
            )
        indices = resolve_layers(peft_config._saved_indices or peft_config.layer, num_layers)  # type: ignore[arg-type]
        check_blocks(model, stack, indices, peft_config)
        peft_config.layer_indices, peft_config.num_layers = indices, num_layers
        peft_config._stack_name = stack.name
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:  # PEFT would name those of the whole model
            peft_config.target_modules = [
                path for _, path, module in targetable(stack, indices) if isinstance(module, (nn.Linear, Conv1D))
            ]
        check_targets(stack, indices, peft_config)
        if peft_config.revision is None:
            peft_config.revision = commit_hash(model)
        return peft_config

    def _is_target(self, config: SingleLayerConfig, key: str) -> bool:
        """Whether the module `key` lies in the chosen block(s), has parameters of its own, and is targeted."""
        prefix = f"{config._stack_name}."
        index, _, path = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or not path or int(index) not in (config.layer_indices or []):
            return False
        if not owns_parameters(self.model.get_submodule(key)):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in config.modules_to_save or []):
            return False
        targets = config.target_modules
        if targets is None:
            return True
        if isinstance(targets, str):
            return matches(targets, path, True, f"{prefix}{index}.")
        return any(matches(target, path, False, f"{prefix}{index}.") for target in targets)

    def _check_target_module_exists(self, peft_config: SingleLayerConfig, key: str) -> bool:
        if self._is_target(peft_config, key):
            return True
        # PEFT does not look inside a module that an earlier adapter wrapped, so that one answers for its children.
        module = self.model.get_submodule(key)
        return isinstance(module, SingleLayerLayer) and any(
            self._check_target_module_exists(peft_config, f"{key}.{name}")
            for name, _ in module.base_layer.named_children()
        )

    def _prepare_model(self, peft_config: SingleLayerConfig, model: nn.Module) -> None:
        stack = find_decoder_stack(model, peft_config.layers_pattern)
        if installed_graph_cut(stack) is None:
            GraphCut(model, stack)
        watch(model)

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
            if self._is_target(peft_config, current_key):
                target.update_layer(adapter_name, peft_config)
            for name, child in list(target.base_layer.named_children()):
                if self._check_target_module_exists(peft_config, key := f"{current_key}.{name}"):
                    self._create_and_replace(peft_config, adapter_name, child, name, target, key)
            return
        layer = SingleLayerLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        # A composite module is wrapped before its children, which then belong to the wrapped module, not the wrapper.
        owner = parent.get_base_layer() if isinstance(parent, SingleLayerLayer) else parent
        setattr(owner, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Unloading puts the base module back as it is; PEFT's own version reads `.weight`, which experts lack."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Masters are made in float32. PEFT's autocast_adapter_dtype=False asks for the base's dtype instead."""
        if autocast_adapter_dtype:
            return
        config = self.peft_config[adapter_name]
        layers = [
            m for m in self.modules() if isinstance(m, SingleLayerLayer) and adapter_name in m.single_layer_params
        ]
        for layer in layers:
            masters = layer.single_layer_params[adapter_name]
            narrowed = any(base.dtype != masters[n].dtype for n, base in layer._base_weights().items())
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

    def enable_input_require_grads(self) -> None:
        """As transformers' own, which hooks the embeddings so that their output requires gradients, with a hook that
        does nothing under torch.compile: it would break the graph, which is cut below the block anyway."""
        self.model.disable_input_require_grads()
        handle = self.model.get_input_embeddings().register_forward_hook(_require_gradients)
        self.model._require_grads_hooks = [handle]  # where transformers' disable_input_require_grads looks

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """transformers' own, without the hook on the embeddings that it adds."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
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
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, SingleLayerLayer) and any(a in module.single_layer_params for a in adapters)
        }
        parts = None  # all of every block, or by their full names what at least one of the adapters has
        if any(config.target_modules is not None for config in configs):
            parts = [name.replace(".base_layer", "") for name in layers]
        self.peft_config[adapter_name] = dataclasses.replace(
            configs[0],
            layer=sorted({index for config in configs for index in config.layer_indices}),
            target_modules=parts,
            master_dtype="float32" if any(c.master_dtype == "float32" for c in configs) else "base",
            init_weights=True,
            layer_indices=None,
            num_layers=None,
            encoding=None,
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            layer.combine(dict(zip(adapters, weights, strict=True)), adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's seam for `adapter_names`, around a forward pass or `generate` (`PeftModel` has the same name).

        Raises:
            ValueError: in training mode, while adapters are merged, for names that do not exist, or not one per row.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, SingleLayerLayer)]
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call eval() first.")
        if any(layer.merged for layer in layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if unknown := sorted(set(names) - {mixed_batch.BASE} - set(self.peft_config)):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has "
                f"{', '.join(self.peft_config)}, and {mixed_batch.BASE} stands for none."
            )

        def check_length(rows: int | None) -> None:
            if rows not in (None, len(names)):
                raise ValueError(
                    "Length of `adapter_names` should be the same as the number of inputs, but got "
                    f"{len(names)} names for a batch of {rows} rows."
                )

        handles = []
        rows = mixed_batch.batch_size(args, kwargs, plain=text_config(self.model) is None)
        check_length(rows)
        if rows is None:  # PeftModelForCausalLM.forward keeps the inputs to itself
            handles.append(
                self.model.register_forward_pre_hook(
                    lambda _, args, kwargs: check_length(mixed_batch.batch_size(args, kwargs)), with_kwargs=True
                )
            )
        for module in self.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs: (args, {**kwargs, "adapter_names": list(names)}), with_kwargs=True
                    )
                )
        try:
            for layer in layers:
                layer.row_adapters = list(names)
            yield
        finally:
            for layer in layers:
                layer.row_adapters = None
            for handle in handles:
                handle.remove()

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """All checks before the first write, so that a merge is done on every layer or on none."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):  # a bare string is refused by PEFT's check_adapters_to_merge
            if unknown := sorted(set(names) - set(self.peft_config)):
                raise ValueError(f"no adapter named {', '.join(unknown)}; the model has {', '.join(self.peft_config)}.")
            for module in self.modules():
                if isinstance(module, SingleLayerLayer) and any(name in module.single_layer_params for name in names):
                    module.refuse_merging()
                    if safe_merge:
                        module.check_mergeable(list(dict.fromkeys([*module.merged_adapters, *names])))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base, on every layer or, if it fails or is interrupted, on none.

        See `BaseTuner.merge_adapter`.
        """
        self._check_merge(adapter_names, safe_merge)
        before = {m: m.merged_adapters for m in self.modules() if isinstance(m, SingleLayerLayer)}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, merged in before.items():
                layer.unmerge()
                if merged:
                    layer.merge(adapter_names=merged)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        else:  # `unload` gives back the base, also when an adapter is merged
            for module in self.modules():
                if isinstance(module, SingleLayerLayer) and module.merged:
                    module.unmerge()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        while any(isinstance(m, SingleLayerLayer) for m in model.modules()):  # those inside a composite module
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for cut in installed_graph_cuts(model):
            cut.remove()
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """What is saved. See `BaseTuner._get_adapter_state_dict`; warns of an adapter that changes nothing."""
        tuned = [
            module
            for module in model.modules()
            if isinstance(module, SingleLayerLayer) and adapter_name in module.single_layer_params
            if adapter_name in module.active_adapters  # TRL's reference adapter is saved too, and may well be the base
        ]
        if tuned and all(layer.equals_base(adapter_name) for layer in tuned):
            warnings.warn(
                f"every weight of the adapter {adapter_name!r} equals the base model's in the base's dtype: it changes "
                "nothing. It was not trained, or its updates were too small.",
                stacklevel=2,
            )
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Insert the adapter's name and check the tensors against the model before anything is written.

        The sparse encoding is decoded here: it is PEFT's one seam between reading a file and writing the model.
        Tensors are cast to the masters' dtype, because `low_cpu_mem_usage=True` assigns them instead of copying.

        Raises:
            ValueError: tensors missing or left over, a wrong shape, NaN or Inf; for a sparse adapter another base.
        """
        forget(model)
        state_dict = restore_sparse(model, config, adapter_name, state_dict)
        modules = dict(model.named_modules())
        for module in modules.values():  # TRL narrows the masters of a quantized model before a checkpoint is loaded
            if isinstance(module, MasterParameters):
                module.widen()
        masters = {
            f"{name}.single_layer_params.{adapter_name}.{key}": parameter
            for name, module in modules.items()
            if isinstance(module, SingleLayerLayer) and adapter_name in module.single_layer_params
            for key, parameter in module.single_layer_params[adapter_name].items()
        }
        full_names = {_file_key(cls._remove_adapter_name_from_key(name, adapter_name)): name for name in masters}
        remapped = {full_names.get(_file_key(key), key): tensor for key, tensor in state_dict.items()}
        # What else PEFT saves: `modules_to_save`, and embeddings that were resized.
        getters: list[Any] = [getattr(model, f"get_{kind}_embeddings", None) for kind in ("input", "output")]
        embeddings = [getter() for getter in getters if getter is not None]
        others = tuple(
            _file_key(f"{name}.")
            for name, module in modules.items()
            if isinstance(module, AuxiliaryTrainingWrapper) or any(module is e for e in embeddings)
        )
        given = {key for key in remapped if key in masters or not _file_key(key).startswith(others)}
        for what, names in (("lacks", masters.keys() - given), ("has unknown", given - masters.keys())):
            if names:
                raise ValueError(
                    f"the adapter {what} {len(names)} tensor(s), for example {printable(min(names))}: "
                    "it was made for another base model or is incomplete."
                )
        for name, master in masters.items():
            tensor = remapped[name]
            if tensor.shape != master.shape:
                raise ValueError(
                    f"the adapter's {name} has shape {tuple(tensor.shape)} and the model's {tuple(master.shape)}: "
                    "it was made for another base model."
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the adapter's {name} holds NaN or Inf.")
            remapped[name] = tensor.to(master.dtype)
        return remapped


def _file_key(name: str) -> str:
    """A tensor's name apart from what depends on how the model is wrapped: PEFT's prefix, and the `base_layer` that
    the wrapper of a composite module puts before its children."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _require_gradients(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    if not torch.compiler.is_compiling():
        output.requires_grad_()


def commit_hash(model: nn.Module) -> str | None:
    """The Hub commit that a transformers model was loaded from; None for a local folder or a plain module."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)
