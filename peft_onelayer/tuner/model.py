"""The tuner: puts the single-layer method into a model, by PEFT's `BaseTuner` contract."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SingleLayerConfig
from .graph_cut import GraphCut, installed_graph_cut, installed_graph_cuts
from .layer import SingleLayerLayer
from .stack import DecoderStack, find_decoder_stack, resolve_layers


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
        """See `BaseTuner.inject_adapter`. Resolving fills in the config, so the model keeps a copy of it: the caller's
        object can be used on another model, and only records what became of it here."""
        given = self.peft_config[adapter_name]
        if given.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS) and given.modules_to_save is None:
            given.modules_to_save = []  # PEFT adds the heads to the caller's list afterwards: share it with the copy
        self.peft_config[adapter_name] = own = copy.copy(given)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        given.layer_indices, given.num_layers = own.layer_indices, own.num_layers

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
                f"this adapter was made for a model of {peft_config._saved_num_layers} layers and this one has "
                f"{num_layers}: it belongs to another base model ({peft_config.base_model_name_or_path})."
            )
        indices = resolve_layers(peft_config._saved_indices or peft_config.layer, num_layers)  # type: ignore[arg-type]
        self._check_blocks(stack, indices, peft_config)
        peft_config.layer_indices, peft_config.num_layers = indices, num_layers
        peft_config._stack_name = stack.name
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:  # PEFT would name those of the whole model
            peft_config.target_modules = [
                path for _, path, module in self._targetable(stack, indices) if isinstance(module, (nn.Linear, Conv1D))
            ]
        self._check_targets(stack, indices, peft_config)
        if peft_config.revision is None:
            peft_config.revision = commit_hash(model)
        return peft_config

    def _check_blocks(self, stack: DecoderStack, indices: list[int], config: SingleLayerConfig) -> None:
        everywhere: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            everywhere.setdefault(id(parameter), []).append(name)
        for index in indices:
            block, prefix = stack.blocks[index], f"{stack.name}.{index}."
            direct = [name for name, _ in block.named_parameters(recurse=False)]
            if direct and config.target_modules is None:
                raise ValueError(
                    f"block {index} ({type(block).__name__}) owns parameters directly ({', '.join(direct)}), which "
                    "cannot be wrapped; name the parts to train with target_modules."
                )
            for name, tensor in (*block.named_parameters(), *block.named_buffers()):
                is_packed = isinstance(tensor, nn.Parameter) and (
                    not tensor.is_floating_point() or tensor.dtype.itemsize < 2  # float8
                )
                if is_packed or name.endswith("qweight"):  # GPTQ and AWQ pack into buffers of that name
                    raise ValueError(
                        f"{prefix}{name} holds {tensor.dtype}: a quantized block cannot be trained in full; "
                        "load the base in bfloat16, or keep this block out of the quantization."
                    )
            for name, parameter in block.named_parameters():
                if "single_layer_params" in name:
                    continue
                others = [n for n in everywhere[id(parameter)] if n != prefix + name]
                if others:
                    raise ValueError(
                        f"{prefix}{name} is shared with {others[0]}; training one layer of a model whose layers share "
                        "parameters would change the other one too."
                    )

    def _check_targets(self, stack: DecoderStack, indices: list[int], config: SingleLayerConfig) -> None:
        """Every entry of `target_modules` must name something in the block: a typo must not shrink what trains."""
        if config.target_modules is None:
            return
        targetable = [(prefix, path) for prefix, path, _ in self._targetable(stack, indices)]
        whole = isinstance(config.target_modules, str)
        for target in [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules:
            if not any(_matches(target, path, whole, prefix) for prefix, path in targetable):
                raise ValueError(
                    f"target_modules entry {target!r} matches nothing in layer {', '.join(map(str, indices))}; "
                    f"its modules are {', '.join(dict.fromkeys(path for _, path in targetable))}."
                )

    @staticmethod
    def _targetable(stack: DecoderStack, indices: list[int]) -> list[tuple[str, str, nn.Module]]:
        """The modules of the blocks with parameters of their own: name of the block with a dot, path inside, module.

        The same whether or not an earlier adapter has wrapped them.
        """
        return [
            (f"{stack.name}.{index}.", re.sub(r"\.base_layer(?=\.|$)", "", path), module)
            for index in indices
            for path, module in stack.blocks[index].named_modules()
            if path and not isinstance(module, SingleLayerLayer) and "single_layer_params" not in path
            if SingleLayerModel._own_parameters(module)
        ]

    @staticmethod
    def _own_parameters(module: nn.Module) -> bool:
        base = module.get_base_layer() if isinstance(module, SingleLayerLayer) else module
        return any(True for _ in base.parameters(recurse=False))

    def _is_target(self, config: SingleLayerConfig, key: str) -> bool:
        """Whether the module `key` lies in the chosen block(s), has parameters of its own, and is targeted."""
        prefix = f"{config._stack_name}."
        index, _, path = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or not path or int(index) not in (config.layer_indices or []):
            return False
        if not self._own_parameters(self.model.get_submodule(key)):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in config.modules_to_save or []):
            return False
        targets = config.target_modules
        if targets is None:
            return True
        if isinstance(targets, str):
            return _matches(targets, path, True, f"{prefix}{index}.")
        return any(_matches(target, path, False, f"{prefix}{index}.") for target in targets)

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
                    "master weights, small RL updates are rounded away (TRL asks for this under DeepSpeed ZeRO-3).",
                    stacklevel=2,
                )
                break
        for layer in layers:
            layer.to_base_dtype(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `BaseTuner.delete_adapter`. PEFT lets each layer choose the next active adapter among its own; with
        adapters on different layers they would disagree."""
        was_active = adapter_name in self.active_adapters
        remaining = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            self.set_adapter(remaining or [min(self.peft_config)])

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """All checks before the first write, so that a merge is done on every layer or on none."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):  # a bare string is refused by PEFT's check_adapters_to_merge
            if unknown := sorted(set(names) - set(self.peft_config)):
                raise ValueError(f"no adapter named {', '.join(unknown)}; the model has {', '.join(self.peft_config)}.")
            for module in self.modules():
                if safe_merge and isinstance(module, SingleLayerLayer):
                    module.check_mergeable(list(dict.fromkeys([*module.merged_adapters, *names])))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base in place, on every layer or, if a check fails, on none. See `BaseTuner.merge_adapter`."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

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
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Insert the adapter's name and check the tensors against the model before anything is written.

        Tensors are cast to the masters' dtype, because `low_cpu_mem_usage=True` assigns them instead of copying.

        Raises:
            ValueError: tensors missing or left over, a wrong shape, NaN or Inf.
        """
        modules = dict(model.named_modules())
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
                    f"the adapter {what} {len(names)} tensor(s), for example {min(names)}: "
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


def commit_hash(model: nn.Module) -> str | None:
    """The Hub commit that a transformers model was loaded from; None for a local folder or a plain module."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def _matches(target: str, path: str, whole: bool, prefix: str) -> bool:
    """PEFT's matching rule for a module of a block or one of its parents: a name, the end of one, or a full regex.

    `path` is relative to the block ("self_attn.q_proj"), `prefix` what stands before it in the model's names. `whole`:
    target_modules is one string, for which PEFT also tries a regular expression on the full name.
    """
    parts = path.split(".")
    for candidate in (".".join(parts[: i + 1]) for i in range(len(parts))):
        if candidate == target or f"{prefix}{candidate}".endswith(f".{target}") or prefix + candidate == target:
            return True
        if whole and (re.fullmatch(target, candidate) or re.fullmatch(target, prefix + candidate)):
            return True
    return False
