"""Weight sync with vLLM: of the trained block alone, of its changed entries alone, checked by the engine's digests."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from peft_onelayer.seams import check
from peft_onelayer.tuner.layer import tuned_layers

from .engines import Engine, InProcess, Manifest, NamedTensors, Server
from .layer_sync import LayerSync
from .transfer import LayerTransfer


def sync_trained_layer(trainer: Trainer, changed_only: bool = True) -> LayerSync:
    """Have TRL send its vLLM the trained block in place of every parameter, and of the block what has changed.

    For trainers with `use_vllm=True`, in the trainer's process ("colocate") or with a server, and for AsyncGRPO and
    AsyncDistillation. Call it before `trainer.train()`. The first push sends everything. Later ones send the tensors of
    the wrapped modules and of `modules_to_save`; under a mask, of the former its entries. After a switch of adapters
    these are sent whole.

    After each push the engine's digests of these tensors are compared with the policy's. Where one differs, because
    the engine was started anew or a push was lost, a warning says so and everything is sent again. Everything is sent
    after sleep level 2 too, which forgets the weights: with `vllm_enable_sleep_mode` that is every time.

    Args:
        trainer: holds a model wrapped with `SingleLayerConfig`.
        changed_only: send the entries whose bits in the engine's dtype have changed since the last push, each with its
            position, where the engine takes entries (a server with the backend `sparse_nccl`; in the process, a vLLM
            that has `checkpoint_weight_patch`); else the tensors with such entries. A whole tensor is sent where it is
            smaller and the engine takes both.

    Returns:
        What does it, with a record of every push.

    Raises:
        ValueError: the trainer's model is not wrapped, or quantized, or shared out by FSDP or DeepSpeed ZeRO-3; the
            trainer does not sync with vLLM by TRL's own ways; or the engine cannot tell digests, or of other tensors.
    """
    check(__name__)
    generation = getattr(trainer, "vllm_generation", None)
    model = trainer.accelerator.unwrap_model(trainer.model if generation is None else generation.model)
    _refuse(trainer, model)
    if generation is not None:
        sync = LayerSync(model, _engine_of(generation), changed_only)
        generation.sync_weights = _GenerationSync(generation, sync)
    else:
        transfer = trainer.weight_transfer  # None: another process sends
        sync = LayerSync(model, None if transfer is None else LayerTransfer.engine(transfer), changed_only)
        if transfer is not None:
            trainer.weight_transfer = LayerTransfer(transfer, sync)
    return sync


def _refuse(trainer: Any, model: Any) -> None:
    if not isinstance(model, PeftModel) or not tuned_layers(model):
        raise ValueError(
            f"the trainer's model, a {type(model).__name__}, is not wrapped with SingleLayerConfig, so no trained "
            "block is known."
        )
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    if trainer.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3):
        raise ValueError(
            "sync_trained_layer reads whole tensors, and FSDP or DeepSpeed ZeRO-3 leaves each process a part; use DDP "
            "or ZeRO-2, or leave it out: TRL's own sync sends everything."
        )
    for layer in tuned_layers(model):
        layer.refuse_merging()
    generation, transfer = getattr(trainer, "vllm_generation", None), getattr(trainer, "weight_transfer", None)
    if isinstance(transfer, LayerTransfer) or isinstance(getattr(generation, "sync_weights", None), _GenerationSync):
        raise ValueError("sync_trained_layer was called for this trainer before; once is enough.")
    if generation is None and transfer is None and trainer.accelerator.is_main_process:
        raise ValueError(
            f"this {type(trainer).__name__} has no sync to take over: it needs use_vllm=True and TRL's VLLMGeneration "
            "(GRPO, RLOO, distillation, ...), or a weight_transfer (AsyncGRPO)."
        )
    if transfer is not None and not type(transfer).__module__.startswith("trl."):
        raise ValueError(
            f"the trainer was given a weight_transfer of its own, a {type(transfer).__name__}, which sends what it "
            "likes; leave weight_transfer= out."
        )
    if generation is not None and generation.mode == "colocate" and generation.tensor_parallel_size > 1:
        raise ValueError(
            f"vllm_tensor_parallel_size={generation.tensor_parallel_size} shares each tensor among several GPUs, so "
            "that digests are those of parts; set 1, or leave out sync_trained_layer."
        )


def _engine_of(generation: Any) -> Engine | None:
    """The engine that this process sends to; None: another one does."""
    if generation.mode == "colocate":
        return InProcess(generation.llm)
    if not generation.accelerator.is_main_process:
        return None
    client = generation.vllm_client

    def send(manifest: Manifest, tensors: NamedTensors) -> None:
        client.update_named_params(list(zip(*manifest.values(), strict=True)), tensors)

    return Server(client.base_url, send, lambda: client.communicator)


class _GenerationSync:
    """Stands in for `VLLMGeneration.sync_weights`."""

    def __init__(self, generation: Any, sync: LayerSync) -> None:
        self.generation, self.sync = generation, sync

    def __call__(self) -> None:
        generation, engine = self.generation, self.sync.engine
        if isinstance(engine, InProcess) and engine.llm is not generation.llm:
            self.sync.engine = InProcess(generation.llm)
            self.sync.forget("restart")
        if generation.mode == "colocate" and generation.enable_sleep_mode:
            if generation._llm_weights_sleeping:  # at level 2, which forgets them
                self.sync.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # as TRL does before it wakes the engine
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        self.sync.push()
        if generation.mode == "colocate":
            generation.llm.reset_prefix_cache()
        elif generation.accelerator.is_main_process:
            generation.vllm_client.reset_prefix_cache()
