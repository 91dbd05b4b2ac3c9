"""Whether training moved the weights: a cheap count at the end of a run, without ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_onelayer.records.movement import Movement

from .change import recorded_revision
from .sources import Pair, held_values, open_base, open_change, open_other


def movement_of_model(model: Any, adapter_name: str | None = None) -> Movement | None:
    """How far an adapter moved in a model in memory: a few passes over its tensors, on the CPU.

    Heads and embeddings that `modules_to_save` adds are not counted.

    Args:
        model: a model that is wrapped by `SingleLayerConfig`, a PeftModel or the tuner.
        adapter_name: the adapter; by default the first active one.

    Returns:
        The movement; None where this process holds but a part of the weights (FSDP2, ZeRO-3) or they are on the meta
        device: `movement_of_files` measures what was saved.

    Raises:
        ValueError: no such adapter, an adapter merged into the base, or NaN or Inf.
    """
    from torch.distributed.tensor import DTensor

    from peft_onelayer.sparse.names import base_name
    from peft_onelayer.tuner.layer import SingleLayerLayer
    from peft_onelayer.tuner.quantized import dequantized

    from .measure import measure

    layers = {name: module for name, module in model.named_modules() if isinstance(module, SingleLayerLayer)}
    if adapter_name is None:
        adapter_name = next((layer.active_adapters[0] for layer in layers.values() if layer.active_adapters), None)
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.single_layer_params}
    if not layers or adapter_name is None:
        raise ValueError(f"the model carries no single-layer adapter {adapter_name!r}.")
    tensors = []
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError("an adapter is merged into the base; call unmerge_adapter() first.")
        for part, parameter in layer.base_layer.named_parameters(recurse=False):
            master = layer.masters(adapter_name).get(part)
            if master is None:
                continue
            both = (parameter, master)
            if any(isinstance(t, DTensor) or t.is_meta or not t.numel() for t in both):
                return None
            base = dequantized(layer.base_layer, parameter)
            master = layer.whole(adapter_name, part, base)
            pair = Pair(base_name(f"{name}.{part}"), held_values(base), held_values(master))
            tensors.append(measure(pair, spectrum=False).movement)
    return Movement(sorted(tensors, key=lambda tensor: tensor.name))


def movement_of_files(
    base: str | Path, other: str | Path, *, revision: str | None = None, allow_other_base: bool = False
) -> Movement:
    """How far an adapter's tensors, or those of a whole checkpoint, moved from the base's; from the files, in pieces.

    Args:
        base: folder or Hub id of the base's checkpoint.
        other: folder or Hub id of an adapter or a checkpoint.
        revision: of the base on the Hub; default, for an adapter of it the commit that it records.
        allow_other_base: measure against a base that the adapter was not trained on.

    Raises:
        ValueError: as `analyze_change`.
    """
    opened = [open_other(other)]
    checkpoint = open_base(base, recorded_revision(base, opened) if revision is None else revision)
    change = open_change(checkpoint, opened, str(other), allow_other_base)
    from .measure import measure

    return Movement([measure(change.pair(name), spectrum=False).movement for name in change.names])
