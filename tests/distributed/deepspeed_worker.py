"""Run by torchrun on two processes with DeepSpeed installed: ZeRO-2 and ZeRO-3 on CPU. The first process saves."""

import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers.integrations import HfDeepSpeedConfig
from tuner.helpers import base_weights, move

from distributed.runs import LAYER, STEPS, copies
from distributed.test_deepspeed import CASES, DTYPES
from models import build, token_batch
from peft_onelayer import SingleLayerConfig

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that would be compiled for minutes


def settings(stage: int, dtype: str, persist: int = 0) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": persist,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def wrapped(config: dict, dtype: str, masters: bool = True):
    base = build(dtype=DTYPES[dtype])
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=base, config_dict_or_path=config)
        assert all(p.numel() == 0 for p in base.parameters())
    peft_config = SingleLayerConfig(layer=LAYER, task_type="CAUSAL_LM")
    return get_peft_model(base, peft_config, autocast_adapter_dtype=masters)


def gathered(model):
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())
    return deepspeed.zero.GatheredParameters(list(model.parameters())) if partitioned else nullcontext()


def training(stage: int, dtype: str, masters: bool, persist: int, checkpointing: bool, folder: Path) -> dict:
    config = settings(stage, dtype, persist)
    active = HfDeepSpeedConfig(config)  # transformers reads it through a weak reference
    model = wrapped(config, dtype, masters)
    start = copies(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, zero_optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        tokens = token_batch(4, seed=10 * step).chunk(2)[dist.get_rank()]
        with torch.no_grad(), model.disable_adapter():  # TRL's reference, between the policy's passes
            reference = engine(input_ids=tokens, labels=tokens).loss
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
    total = torch.stack([*losses, reference.float()])
    dist.all_reduce(total)
    with gathered(model):
        found = {
            "start": start,
            "masters": copies(model),
            "base": base_weights(model),
            "losses": total / 2,
        }  # the last is the reference's
    if stage == 3:
        found["optimizer_dtypes"] = {t.dtype for t in zero_optimizer.fp32_partitioned_groups_flat}
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = model.state_dict()
    found["adapter"] = str(folder / f"{stage}-{dtype}-{masters}-{persist}-{checkpointing}")
    if dist.get_rank() == 0:
        model.save_pretrained(found["adapter"], state_dict=state)
    del active
    return found


@torch.no_grad()
def merging() -> dict:
    config = settings(3, "float32")
    active = HfDeepSpeedConfig(config)
    model = wrapped(config, "float32")
    move(model, scale=0.3)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    tokens = token_batch()
    found = {"adapter": engine(tokens).logits}
    model.merge_adapter(safe_merge=True)
    found["merged"] = engine(tokens).logits
    with gathered(model):
        found["merged_base"] = base_weights(model)
    model.unmerge_adapter()
    with gathered(model):
        found["base"] = base_weights(model)
        model.merge_adapter()  # as TRL does around a push to vLLM
        found["merged_by_trl"] = base_weights(model)
        model.unmerge_adapter()
    found["unmerged"] = engine(tokens).logits
    with model.disable_adapter():
        found["disabled"] = engine(tokens).logits
    del active
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    results = {"training": {case: training(*case, folder) for case in CASES}, "merging": merging()}
    if dist.get_rank() == 0:
        torch.save(results, folder / "deepspeed.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
