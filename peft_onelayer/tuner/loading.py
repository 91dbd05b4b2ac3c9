"""Loads adapters stored in the sparse encoding into a model, through PEFT or through transformers.

The encoding and its checks are those of peft_onelayer.adapter; this module finds the base's tensors in a wrapped model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from peft_onelayer.records.text import printable
from peft_onelayer.sparse.encoding import SparseEncoding, base_name, describe_base
from peft_onelayer.sparse.tensor import split_key

from .config import SingleLayerConfig
from .layer import SingleLayerLayer
from .quantized import is_quantized

LOADER = "_load_pretrained_model"  # transformers: PreTrainedModel.load_adapter calls it on the instance
Remap = Callable[[Any, Any, str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def restore_sparse(
    model: Any, config: SingleLayerConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Exchange the sparse tensors in `state_dict` for dense ones, in the base's dtype; a dense one comes back as it is.

    Nothing is written to the model.

    Raises:
        ValueError: another base, or a damaged adapter; `SparseEncoding.restore` lists the checks.

    Warns:
        UserWarning: the base's tensors are those trained on, and its configuration is another.
    """
    layers = {
        base_name(f"{path}.single_layer_params.{name}"): (layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, SingleLayerLayer) and adapter_name in layer.single_layer_params
        for name, _ in layer._own()
    }
    if not any(base_name(stem) in layers for stem, suffix in map(split_key, state_dict) if suffix):
        return state_dict  # also when a run that began with a sparse adapter resumes from its dense checkpoint
    if config.encoding is None:
        raise ValueError(
            f"the file is sparse, and the configuration of the adapter {adapter_name!r} says nothing of it: if the "
            "adapter was in the model before, load the folder under another name; else adapter_config.json is damaged."
        )
    encoding = SparseEncoding.from_json(config.encoding)
    if different := layers.keys() ^ encoding.tensors.keys():
        raise ValueError(
            f"the adapter's encoding and the model's block differ in {len(different)} tensor(s), for example "
            f"{printable(min(different))}: it was made for another base model or is damaged."
        )
    groups, others = encoding.group(state_dict)
    restored = {key: state_dict[key] for key in others}
    base_config = getattr(model, "config", None)
    found = describe_base(
        base_config if hasattr(base_config, "to_diff_dict") else None,
        getattr(base_config, "_name_or_path", None),
        getattr(base_config, "_commit_hash", None),
        config.num_layers or 0,
    )
    for name, (layer, parameter_name) in layers.items():  # before any digest: the plainest difference is named first
        encoding.check_shape(name, layer.single_layer_params[adapter_name][parameter_name].shape, found)
    for name, group in groups.items():
        layer, parameter_name = layers[name]
        parameter = dict(layer._own())[parameter_name]
        with layer._whole():
            if is_quantized(parameter) and not config._allow_other_base:
                raise encoding.other_base(f"it is quantized ({type(parameter).__name__} of {parameter.dtype})", found)
            base = layer._base_weights()[parameter_name]
            if base.is_meta:
                raise ValueError(f"the base's {name} is on the meta device; load the base's weights first.")
            parts = {suffix: state_dict[key] for suffix, key in group.items()}
            value = encoding.restore(name, parts, base, config._allow_other_base, found)
        suffix, key = next(iter(group.items()))
        restored[key.removesuffix(f".{suffix}")] = value
    if not config._allow_other_base and (difference := encoding.other_config(found)):
        warnings.warn(difference, stacklevel=2)
    return restored


def read_through_transformers(model: nn.Module, adapter_name: str, remap: Remap) -> None:
    """Have the next `model.load_adapter` of transformers decode the file; PEFT's remapping does not run there.

    transformers' loader takes keys one by one, so the file cannot be decoded inside it. The attribute on the instance
    is in effect for one call and is removed by `forget` where PEFT loads instead.
    """
    setattr(model, LOADER, functools.partial(_load_pretrained_model, adapter_name, remap))


def forget(model: nn.Module) -> None:
    """Undo `read_through_transformers` on a model and all within."""
    for module in model.modules():
        vars(module).pop(LOADER, None)


def _load_pretrained_model(adapter_name: str, remap: Remap, *, model: Any, **kwargs: Any) -> Any:
    state_dict, files = kwargs["state_dict"], kwargs["checkpoint_files"]
    if state_dict is None and all(str(file).endswith(".safetensors") for file in files):
        state_dict = {key: tensor for file in files for key, tensor in load_file(file).items()}
    forget(model)
    if state_dict is not None:
        kwargs["state_dict"] = remap(model, model.peft_config[adapter_name], adapter_name, state_dict)
    return getattr(model, LOADER)(model=model, **kwargs)
