"""Run on two processes: FSDP2 (`fully_shard`), FSDP1, and what of them is refused.

The first process saves what it found. Accelerate ignores FSDP on CPU, so `fully_shard` is called directly, and
accelerate's own preparation (`fsdp2_prepare_model`) with a stand-in for the accelerator.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from tuner.helpers import base_name, move, tuner_layers, wrap

from distributed.launch import end
from distributed.runs import fresh, masked, train
from distributed.test_fsdp import DTYPES, FSDP1, INSIDE, POLICIES, TRAINING
from models import build, token_batch
from peft_onelayer import SingleLayerConfig

OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def blocks(model):
    return model.get_base_model().get_decoder().layers


def shard(model, **options):
    """Shard each block, then the rest: what accelerate does with fsdp_version 2."""
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **options}
    for block in blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def shard_root(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def prepare_by_accelerate(model, ram_efficient: bool):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        cpu_ram_efficient_loading=ram_efficient,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
        process_index=dist.get_rank(),
    )
    return fsdp2_prepare_model(accelerator, model)


def full_state(model) -> dict[str, torch.Tensor]:
    """The whole model's tensors, by the names they have in it; a collective."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in state.items()}


def split(state: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """(the masters, the base), by their names in the unwrapped model."""
    tuned = {base_name(n): t for n, t in state.items() if "single_layer_params" in n}
    return tuned, {base_name(n): t for n, t in state.items() if "single_layer_params" not in n}


SETTINGS = {
    "blocks": shard,
    "kept": partial(shard, reshard_after_forward=False),
    "root": shard_root,
    "mixed_precision": partial(shard, mp_policy=BF16),
    "cpu_offload": partial(shard, **OFFLOAD),
    "accelerate": partial(prepare_by_accelerate, ram_efficient=False),
    "accelerate-ram": partial(prepare_by_accelerate, ram_efficient=True),
}
assert SETTINGS.keys() == set(POLICIES)


def training(policy: str, dtype: str, checkpointing: str, folder: Path) -> dict:
    model = SETTINGS[policy](fresh(DTYPES[dtype], checkpointing))
    losses = torch.stack(train(model, rank=dist.get_rank(), world=dist.get_world_size()))
    dist.all_reduce(losses)
    state = full_state(model)
    where = folder / f"{policy}-{dtype}-{checkpointing}" / f"process-{dist.get_rank()}"
    if dist.get_rank() == 0:
        model.save_pretrained(str(where), state_dict=state)
    tuned, base = split(state)
    return {"losses": losses / dist.get_world_size(), "masters": tuned, "base": base, "adapter": str(where)}


def training_under_a_mask(folder: Path) -> dict:
    own = folder / f"mask-{dist.get_rank()}"
    own.mkdir()
    model = shard(masked(own))
    losses = torch.stack(train(model, rank=dist.get_rank(), world=dist.get_world_size()))
    dist.all_reduce(losses)
    state = full_state(model)
    if dist.get_rank() == 0:
        model.save_pretrained(str(own / "adapter"), state_dict=state)
    return {"losses": losses / dist.get_world_size(), "masters": split(state)[0], "adapter": str(own / "adapter")}


@torch.no_grad()
def merging(policy: str) -> dict:
    """Merge and unmerge a moved adapter, after a forward pass that may have left whole parameters behind."""
    model = wrap(build(dtype=torch.bfloat16), layer=2)
    move(model, scale=0.3)
    model = SETTINGS[policy](model)
    tokens = token_batch()
    found = {"adapter": model(tokens).logits}
    before = full_state(model)
    model(tokens)  # full_state brought the shards back
    model.merge_adapter()
    found["merged"] = model(tokens).logits
    found["merged_base"] = split(full_state(model))[1]
    try:
        with model.disable_adapter():
            model(tokens)
    except RuntimeError as error:
        found["disabled"] = str(error)
    model(tokens)
    model.unmerge_adapter()
    after = full_state(model)
    found["restored"] = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    found["unmerged"] = model(tokens).logits
    with model.disable_adapter():
        found["base"] = model(tokens).logits
    return found


@torch.no_grad()
def outcome(make) -> tuple[str, str]:
    """What comes out of a wrap: "adapter", "base" (the silent failure) or the error."""
    model = wrap(build(), layer=2)
    move(model, scale=0.3)
    tokens = token_batch()
    adapter = model(tokens).logits
    with model.disable_adapter():
        base = model(tokens).logits
    try:
        logits = make(model)(tokens).logits
    except Exception as error:
        return type(error).__name__, str(error)
    near = {name: torch.allclose(logits, want, atol=1e-4) for name, want in (("adapter", adapter), ("base", base))}
    return ",".join(name for name, is_near in near.items() if is_near), ""


def shard_inside(what: str, model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in tuner_layers(model):
        part: nn.Module = {
            "base_layer": layer.base_layer,
            "masters": layer.single_layer_params["default"],
            "tuner_layer": layer,
        }[what]
        fully_shard(part, mesh=mesh)
    return shard(model)


def fsdp1(policy: str, use_orig_params: bool, model):
    block = type(blocks(model)[0])
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if policy == "peft" else ModuleWrapPolicy([block]),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def merge_fsdp1(model):
    fsdp1("blocks", True, model)
    model.merge_adapter()
    return model


def add_after_sharding(model):
    model = shard(model)
    model.add_adapter("second", SingleLayerConfig(layer=2))
    return model


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        "training": {case: training(*case, folder) for case in TRAINING},
        "mask": training_under_a_mask(folder),
        "merging": {policy: merging(policy) for policy in ("blocks", "kept", "root")},
        "inside": {what: outcome(partial(shard_inside, what)) for what in INSIDE},
        "fsdp1": {case: outcome(partial(fsdp1, *case)) for case in FSDP1},
        "merge_fsdp1": outcome(merge_fsdp1),
        "add_after_sharding": outcome(add_after_sharding),
    }
    if dist.get_rank() == 0:
        torch.save(results, folder / "fsdp.pt")
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
