"""Base weights and masters that several processes share between them: FSDP and DeepSpeed ZeRO-3.

FSDP2 (`fully_shard`) swaps a module's parameters for whole ones around a forward pass and for shards otherwise; both
are found where the module keeps them, so the tuner layer works unchanged inside a sharded block. ZeRO-3 empties the
parameters themselves between uses. FSDP1 takes them out of the module, which leaves nothing to put the masters in
place of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from peft_onelayer.seams import check


def refuse_silent_wrap(base_layer: nn.Module, own: dict[str, Any], adapters: list[nn.Module]) -> None:
    """Raise RuntimeError if the base layer would compute with its own parameters whatever is put in their place.

    Args:
        own: the base layer's own parameters.
        adapters: the modules that hold the masters, one for each adapter.
    """
    what = type(base_layer).__name__
    modules = [base_layer, *adapters]
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in modules):
        raise RuntimeError(
            f"FSDP is applied inside the trained block, to a part of the wrapped {what}: its own "
            "weights would come back in the forward pass and the adapter have no effect; apply fully_shard to whole "
            "blocks (FSDP2; with accelerate fsdp_version: 2)."
        )
    if any(type(module).__module__.startswith("torch.ao.") for module in modules):
        raise RuntimeError(
            f"torch.ao.quantization has put a {what} of its own into the trained block, whose packed weights the "
            "adapter cannot take the place of; call merge_and_unload() first and quantize what it returns."
        )
    # FSDP1 leaves plain tensors instead, as attributes that also hide what is put in `_parameters`.
    masters = {name for adapter in adapters for name, master in adapter._parameters.items() if master is not None}
    taken = "_former_parameters" not in vars(base_layer) and any(n not in own or n in vars(base_layer) for n in masters)
    if taken or any(getattr(parameter, "_fsdp_flattened", False) for parameter in own.values()):
        raise RuntimeError(
            f"the wrapped {what} has lost its parameters: FSDP1 (FullyShardedDataParallel) "
            "flattens them, and the adapter would have no effect; use FSDP2 (fully_shard; with accelerate "
            "fsdp_version: 2)."
        )


def refuse_new_adapter(base_layer: nn.Module) -> None:
    """Raise RuntimeError for an adapter added to a sharded module: FSDP2 would neither gather nor shard it."""
    if is_fully_sharded(base_layer):
        raise RuntimeError(
            "the model is sharded by fully_shard, which does not see parameters added later: add or load every "
            "adapter first, then shard."
        )


def refuse_unmerging_in_forward(base_layer: nn.Module) -> None:
    """Raise RuntimeError where a forward pass would have to change shards that are gathered at that moment."""
    if is_fully_sharded(base_layer):
        raise RuntimeError(
            "the adapter is merged into a base sharded by fully_shard; call unmerge_adapter() before running the "
            "model with the adapter disabled, and before training it."
        )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the module's own parameters, at present sharded or whole.

    Its one mark on such a module is the hook that `FSDPParam.__init__` registers.
    """
    hooks = module._load_state_dict_post_hooks.values()
    return any(str(hook.__module__).startswith("torch.distributed.fsdp.") for hook in hooks)


def to_shards(modules: Iterable[nn.Module]) -> None:
    """Have FSDP2 put the shards back where a forward pass left whole parameters, so that what is written lasts.

    It does so before a state dict is made (`FSDPParamGroup._register_state_dict_hooks`).
    """
    for module in modules:
        if is_fully_sharded(module):
            module.state_dict()


def is_partitioned(parameter: torch.Tensor | None) -> bool:
    """Whether DeepSpeed ZeRO-3 manages the parameter, at present gathered or not."""
    return hasattr(parameter, "ds_status")


@contextmanager
def gathered(parameters: Iterable[Any], write: bool = False) -> Iterator[None]:
    """Make parameters whole that DeepSpeed ZeRO-3 has partitioned; a collective, to be entered by every process.

    Those already gathered by the caller are left alone (DeepSpeed refuses to gather twice). PEFT's
    `gather_params_ctx` asks for transformers' DeepSpeed configuration; here the parameters decide.

    Args:
        write: keep what is written to the parameters (that of the first process).
    """
    partitioned = [p for p in parameters if is_partitioned(p) and p.ds_status.name == "NOT_AVAILABLE"]
    if not partitioned:
        yield
        return
    check(__name__)
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield
