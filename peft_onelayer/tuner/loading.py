"""Loads an adapter's tensors into a model: checks them, decodes the sparse encoding, through PEFT or transformers.

PEFT's seam between reading a file and writing the model is the tuner's `_remap_adapter_state_dict_for_load`, which
calls `loadable_state_dict`. transformers has no such seam, so there its own loader is intercepted for one call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from peft_onelayer.records.text import printable
from peft_onelayer.sparse.base import WIDTHS
from peft_onelayer.sparse.digest import dtype_name
from peft_onelayer.sparse.encoding import SparseEncoding, describe_base
from peft_onelayer.sparse.names import MASK, base_name, split_key, unwrapped

from .base import commit_hash
from .config import SingleLayerConfig
from .layer import SingleLayerLayer
from .mask import Mask, pack, positions, scatter, shape_of, split_masks, unpack
from .quantized import is_quantized
from .sharding import is_partitioned

LOADER = "_load_pretrained_model"  # transformers: PreTrainedModel.load_adapter calls it on the instance


def loadable_state_dict(
    model: Any, config: SingleLayerConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file by the names of the model's parameters, decoded and checked against the model.

    No value is written to the model. Tensors are cast to the masters' dtype, because `low_cpu_mem_usage=True` assigns
    them instead of copying. Where the file holds masks, the masters become flat, with the entries that train.

    Raises:
        ValueError: tensors missing or left over, a wrong shape or dtype, NaN or Inf; for a sparse adapter another base;
            for one that was trained under a mask another mask, none where it is to be trained, or changes beside it.
    """
    state_dict, masks = split_masks(state_dict)
    state_dict = _restore_sparse(model, config, adapter_name, state_dict)
    modules = {name.replace("_checkpoint_wrapped_module.", ""): module for name, module in model.named_modules()}
    for module in modules.values():  # TRL narrows the masters of a quantized model before a checkpoint is loaded
        if isinstance(module, SingleLayerLayer):
            module.widen()
    masters = {
        f"{name}.single_layer_params.{adapter_name}.{key}": parameter
        for name, module in modules.items()
        if isinstance(module, SingleLayerLayer) and adapter_name in module.single_layer_params
        for key, parameter in module.masters(adapter_name).items()
    }
    owners = {
        f"{name}.single_layer_params.{adapter_name}.{key}": (module, key, base_name(f"{name}.{key}"))
        for name, module in modules.items()
        if isinstance(module, SingleLayerLayer) and adapter_name in module.single_layer_params
        for key in module.masters(adapter_name)
    }
    full_names = {_file_key(BaseTuner._remove_adapter_name_from_key(name, adapter_name)): name for name in masters}
    remapped = {full_names.get(_file_key(key), key): tensor for key, tensor in state_dict.items()}
    if len(remapped) < len(state_dict):
        raise ValueError(f"the adapter holds {len(state_dict) - len(remapped)} tensor(s) twice: it is damaged.")
    known = model.state_dict().keys()
    beside = _saved_beside(model, config, adapter_name, remapped)
    given = remapped.keys() - beside.keys()
    for what, names in (("lacks", masters.keys() - given), ("has unknown", given - masters.keys())):
        if names:
            raise ValueError(
                f"the adapter {what} {len(names)} tensor(s), for example {printable(min(names))}: "
                "it was made for another base model, is incomplete, or holds what its configuration does not say."
            )
    where = _positions(config, adapter_name, owners, {full_names.get(_file_key(k), k): m for k, m in masks.items()})
    for name, parameter in (masters | beside).items():
        tensor = remapped[name]
        shape = parameter.shape
        if name in owners and owners[name][1] in owners[name][0].positions(adapter_name):
            shape = torch.Size(shape_of(dict(owners[name][0]._own())[owners[name][1]]))
        if tensor.shape != shape:
            raise ValueError(
                f"the adapter's {printable(name)} has shape {tuple(tensor.shape)} and the model's "
                f"{tuple(shape)}: it was made for another base model."
            )
        if not tensor.is_floating_point() and not parameter.is_floating_point():
            continue  # a counter of a module that is saved whole
        if dtype_name(tensor) not in WIDTHS:
            raise ValueError(f"the adapter's {printable(name)} holds {dtype_name(tensor)}, which no adapter has.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the adapter's {printable(name)} holds NaN or Inf.")
        if name in masters:
            remapped[name] = tensor.to(parameter.dtype)
    for name, entries in where.items():
        module, key, _ = owners[name]
        remapped[name] = _trained_entries(config, module, key, remapped[name], entries)
        if key not in module.positions(adapter_name):
            module.flatten_master(adapter_name, key, entries)
    config.embeddings_seen |= set(config.saved_embeddings or [])
    config.saved_embeddings = None  # another file may come under this name
    # a head of `modules_to_save` that is an embedding too was written once more, under a name that no parameter has
    return {name: tensor for name, tensor in remapped.items() if ".modules_to_save." not in name or name in known}


def _positions(
    config: SingleLayerConfig,
    adapter_name: str,
    owners: dict[str, tuple[SingleLayerLayer, str, str]],
    masks: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The flat positions of the entries that train, by the names of the masters, from the adapter's file or, where it
    holds none, from the configuration; empty where the masters stay whole.

    Raises:
        ValueError: as `loadable_state_dict` says of masks.
    """
    if not masks:
        if config.mask is not None and config.entries is None and not config.inference_mode:
            raise ValueError(
                "the adapter was trained under a mask, which its file does not hold: to train it further, take "
                "config = SingleLayerConfig.from_pretrained(folder), set config.mask to the mask's file, and pass "
                "config=config to PeftModel.from_pretrained."
            )
        held = {name: module.positions(adapter_name) for name, (module, _, _) in owners.items()}
        return {name: held[name][key] for name, (_, key, _) in owners.items() if key in held[name]}
    found = {
        name: unpack(name, masks[name], torch.Size(shape_of(dict(module._own())[key])))
        for name, (module, key, _) in owners.items()
        if name in masks
    }
    if len(found) < max(len(masks), len(owners)):
        raise ValueError("the adapter's file holds masks of some of its tensors and not of others: it is damaged.")
    read = Mask({base: found[name] for name, (_, _, base) in owners.items()})
    if read.record() != config.mask:
        here = "another mask was given" if config.entries is not None else "it is damaged"
        raise ValueError(f"the mask in the adapter's file is not the one that its configuration records: {here}.")
    config.entries = read
    return {name: positions(mask) for name, mask in found.items()}


def _trained_entries(
    config: SingleLayerConfig, module: SingleLayerLayer, key: str, tensor: torch.Tensor, where: torch.Tensor
) -> torch.Tensor:
    """The entries at the positions `where` of a whole tensor, (n,).

    Raises:
        ValueError: the others are not the base's.
    """
    values = tensor.flatten()
    where = where.to(tensor.device)
    with module._gathered():
        base = module._base_weights()[key].detach()
        readable = not (base.is_meta or isinstance(base, DTensor) or base.numel() < values.numel())
        if readable and not config.allow_other_base:
            kept = torch.ones(len(values), dtype=torch.bool, device=values.device).index_fill(0, where, False)
            here = base.to(values.device).flatten()
            if not torch.equal(values[kept].to(here.dtype), here[kept]):
                raise ValueError(f"the adapter changes entries of its {key} beside its mask: it is damaged.")
    return values[where]


def masked_tensors(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """What is saved in place of an adapter's flat masters: by their keys in the model's state dict the whole tensor
    under the suffix "", and the bits of its mask under `MASK`."""
    saved: dict[str, dict[str, torch.Tensor]] = {}
    plain = {unwrapped(key): key for key in state_dict}
    for path, module in model.named_modules():
        if not isinstance(module, SingleLayerLayer) or adapter_name not in module.single_layer_params:
            continue
        origins = module._base_weights()
        for name, where in module.positions(adapter_name).items():
            key = plain[unwrapped(f"{path}.single_layer_params.{adapter_name}.{name}")]
            base: Any = origins[name]
            if isinstance(base, DTensor) or is_partitioned(base):
                base = state_dict[plain[unwrapped(f"{path}.base_layer.{name}")]]
            values, where = state_dict[key], where.to(state_dict[key].device)
            base = base.detach().to(values.device, values.dtype)
            mask = torch.zeros(base.numel(), dtype=torch.bool, device=values.device).index_fill(0, where, True)
            saved[key] = {"": scatter(base, where, values), MASK: pack(mask)}
    return saved


def _saved_beside(
    model: Any, config: SingleLayerConfig, adapter_name: str, keys: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The model's tensors beside the masters that an adapter's file may hold, by its keys: those of `modules_to_save`,
    and the embeddings that PEFT saves: as the configuration says, because the vocabulary was resized, or those saved or
    loaded before under this name, for which PEFT reads no configuration again.

    Raises:
        ValueError: an embedding that the configuration names is not in the file.
    """
    modules = dict(model.named_modules())
    allowed: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for stored, loaded in module.adapter_state_dict_load_map(adapter_name).items():
                tensor = module.state_dict()[loaded]
                allowed |= {_file_key(f"{path}.{key}"): tensor for key in (stored, loaded)}
    getters: list[Any] = [getattr(model, f"get_{kind}_embeddings", None) for kind in ("input", "output")]
    embeddings = [getter() for getter in getters if getter is not None]
    named = {
        _file_key(BaseTuner._remove_adapter_name_from_key(f"{path}.{name}", adapter_name)): tensor
        for path, module in modules.items()
        if any(module is embedding for embedding in embeddings)
        for name, tensor in module.named_parameters()
    }
    given = {_file_key(key): key for key in keys}
    saved = set(config.saved_embeddings or [])
    if missing := sorted(saved - given.keys() - allowed.keys()):
        raise ValueError(
            f"the adapter lacks {printable(missing[0])}, which its configuration names in saved_embeddings: it is "
            "incomplete."
        )
    saved |= config.embeddings_seen
    if named.keys() & given.keys() - saved - allowed.keys() and _vocabulary_was_resized(model):
        saved |= named.keys()
    allowed |= {name: tensor for name, tensor in named.items() if name in saved and name not in allowed}
    return {given[name]: tensor for name, tensor in allowed.items() if name in given}


def _vocabulary_was_resized(model: Any) -> bool:
    """Whether the model's vocabulary has another size than in the configuration it was loaded from, as far as that is
    on this machine: then PEFT saves the embeddings without being asked, and a run that resumes loads them."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name or not hasattr(config, "vocab_size"):
        return False
    try:
        before = type(config).from_pretrained(name, revision=commit_hash(model), local_files_only=True)
    except (OSError, ValueError):
        return False
    return before.vocab_size != config.vocab_size


def _restore_sparse(
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
        for name in layer.masters(adapter_name)
    }
    if not any(base_name(stem) in layers for stem, suffix in map(split_key, state_dict) if suffix):
        return state_dict  # also when a run that began with a sparse adapter resumes from its dense checkpoint
    if config.encoding is None:
        raise ValueError(
            f"the file is sparse, and the configuration of the adapter {adapter_name!r} says nothing of it: if the "
            "adapter was in the model before, load the folder under another name; else adapter_config.json is damaged."
        )
    encoding = SparseEncoding.from_json(config.encoding)
    base_config = getattr(model, "config", None)
    found = describe_base(
        base_config if hasattr(base_config, "to_diff_dict") else None,
        getattr(base_config, "_name_or_path", None),
        commit_hash(model),
        config.num_layers or 0,
    )

    @contextmanager
    def base_tensor(name: str) -> Iterator[torch.Tensor]:
        layer, parameter_name = layers[name]
        parameter = dict(layer._own())[parameter_name]
        with layer._gathered():
            if is_quantized(parameter) and not config.allow_other_base:
                raise encoding.other_base(f"it is quantized ({type(parameter).__name__} of {parameter.dtype})", found)
            base = layer._base_weights()[parameter_name]
            if base.is_meta:
                raise ValueError(f"the base's {name} is on the meta device; load the base's weights first.")
            yield base

    shapes = {
        name: shape_of(dict(layer._own())[key])
        if key in layer.positions(adapter_name)
        else layer.masters(adapter_name)[key].shape
        for name, (layer, key) in layers.items()
    }
    restored = encoding.decode(state_dict, shapes, base_tensor, config.allow_other_base, found)
    if not config.allow_other_base and (difference := encoding.other_config(found)):
        warnings.warn(difference, stacklevel=2)
    return restored


def intercept_transformers(model: nn.Module, adapter_name: str) -> None:
    """Have the next `model.load_adapter` of transformers load what `loadable_state_dict` makes of the file.

    transformers' loader takes keys one by one, so the sparse encoding cannot be decoded inside it. The attribute on
    the instance is in effect for one call and is removed by `stop_intercepting` where PEFT loads instead.
    """
    setattr(model, LOADER, functools.partial(_load_pretrained_model, adapter_name))


def stop_intercepting(model: nn.Module) -> None:
    """Undo `intercept_transformers` on a model and all within."""
    for module in model.modules():
        vars(module).pop(LOADER, None)


def _load_pretrained_model(adapter_name: str, *, model: Any, **kwargs: Any) -> Any:
    state_dict, files = kwargs["state_dict"], kwargs["checkpoint_files"]
    if state_dict is None and all(str(file).endswith(".safetensors") for file in files):
        state_dict = {key: tensor for file in files for key, tensor in load_file(file).items()}
    stop_intercepting(model)
    if state_dict is not None:
        kwargs["state_dict"] = loadable_state_dict(model, model.peft_config[adapter_name], adapter_name, state_dict)
    return getattr(model, LOADER)(model=model, **kwargs)


def _file_key(name: str) -> str:
    """A tensor's name apart from what depends on how the model is wrapped: PEFT's prefix, the names of torch.compile
    and of data parallelism, and the `base_layer` that the wrapper of a composite module puts before its children."""
    return unwrapped(name).removeprefix("base_model.model.").removeprefix("module.").replace(".base_layer.", ".")
