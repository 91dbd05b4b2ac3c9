"""Weight sync with vLLM: of the trained block alone, of its changed entries alone, checked by the engine's digests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from peft_onelayer.seams import check
from peft_onelayer.tuner.layer import tuned_layers

from .engines import Engine, InProcess, Manifest, NamedTensors, Server, manifest_of
from .policy_weights import Entries, PolicyWeights, changed, digest, held_as


def sync_trained_layer(trainer: Trainer, changed_only: bool = True) -> LayerSync:
    """Have TRL send its vLLM the trained block in place of every parameter, and of the block what has changed.

    For trainers with `use_vllm=True`, in the trainer's process ("colocate") or with a server, and for AsyncGRPO and
    AsyncDistillation. Call it before `trainer.train()`. The first push sends everything. Later ones send the tensors of
    the wrapped modules and of `modules_to_save`; under a mask, of the former its entries. After a switch of adapters
    these are sent whole.

    After each push the engine's digests of these tensors are compared with the policy's. Where one differs, for instance
    because the engine was started anew or a push was lost, a warning says so and everything is sent again. It is also sent
    again after sleep level 2, which forgets the weights, so with `vllm_enable_sleep_mode` nothing is saved.

    Args:
        trainer: holds a model wrapped with `SingleLayerConfig`.
        changed_only: send the entries whose bits in the engine's dtype have changed since the last push, each with its
            position, where the engine takes entries (a server with the backend `sparse_nccl`; in the process, a vLLM
            that has `checkpoint_weight_patch`); else the tensors with such entries. A whole tensor is sent where it
            is smaller and the engine takes both.

    Returns:
        What does it, with a record of every push.

    Raises:
        ValueError: the trainer's model is not wrapped, or shared out by FSDP or DeepSpeed ZeRO-3, or quantized; the
            trainer does not sync with vLLM by ways of its own; or the engine cannot tell its digests or has other tensors.
    """
    check(__name__)
    generation = getattr(trainer, "vllm_generation", None)
    model = trainer.accelerator.unwrap_model(trainer.model if generation is None else generation.model)
    _refuse(trainer, model)
    if generation is not None:
        sync = LayerSync(model, _engine_of(generation), changed_only)
        generation.sync_weights = _GenerationSync(generation, sync)
    else:
        transfer = trainer.weight_transfer
        sync = LayerSync(model, None if transfer is None else _engine_behind(transfer), changed_only)
        if transfer is not None:
            trainer.weight_transfer = _Transfer(transfer, sync)
    return sync


def _refuse(trainer: Any, model: Any) -> None:
    if not isinstance(model, PeftModel) or not tuned_layers(model):
        raise ValueError(
            f"the trainer's model, a {type(model).__name__}, is not wrapped with SingleLayerConfig, so no trained block is "
            "known."
        )
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    if trainer.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3):
        raise ValueError(
            "sync_trained_layer reads whole tensors, and FSDP or DeepSpeed ZeRO-3 leaves each process a part; use DDP or "
            "ZeRO-2, or leave it out: TRL's own sync sends everything."
        )
    for layer in tuned_layers(model):
        layer.refuse_merging()
    generation, transfer = getattr(trainer, "vllm_generation", None), getattr(trainer, "weight_transfer", None)
    if isinstance(transfer, _Transfer) or isinstance(getattr(generation, "sync_weights", None), _GenerationSync):
        raise ValueError("sync_trained_layer was called for this trainer before; once is enough.")
    if generation is None and transfer is None and trainer.accelerator.is_main_process:
        raise ValueError(
            f"this {type(trainer).__name__} syncs no weights that could be taken over: it needs use_vllm=True and TRL's "
            "VLLMGeneration (GRPO, RLOO, distillation, ...), or a weight_transfer (AsyncGRPO)."
        )
    if transfer is not None and not type(transfer).__module__.startswith("trl."):
        raise ValueError(
            f"the trainer was given a weight_transfer of its own, a {type(transfer).__name__}, which sends what it likes; "
            "leave weight_transfer= out."
        )
    if generation is not None and generation.mode == "colocate" and generation.tensor_parallel_size > 1:
        raise ValueError(
            f"vllm_tensor_parallel_size={generation.tensor_parallel_size} shares each tensor among several GPUs, so that "
            "digests are those of parts; set 1, or leave out sync_trained_layer."
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


def _engine_behind(transfer: Any) -> Engine:
    """The engine of AsyncGRPO's `WeightTransferClient`."""
    announced = transfer._weight_update_info

    def send(manifest: Manifest, tensors: NamedTensors) -> None:
        transfer._weight_update_info = {**announced, **manifest}
        transfer.send_weights(tensors)

    return Server(transfer.vllm.server_url, send, lambda: transfer.model_update_group)


@dataclass(frozen=True)
class Push:
    """What one push sent.

    Attributes:
        why: "first", "sleep", "digest" or "error" for everything; "adapters" for the tensors of the blocks whole,
            "block" for what trains of them, "changes" for what has changed.
        nbytes: of tensors, values and positions.
        tensors: how many were sent whole.
        entries: how many were sent with their positions.
    """

    why: str
    nbytes: int
    tensors: int
    entries: int


class LayerSync:
    """Keeps an engine at the weights of a policy.

    It holds a copy of what may have changed, in the engine's dtype.

    Attributes:
        pushes: what was sent, in order.
    """

    def __init__(self, model: PeftModel, engine: Engine | None, changed_only: bool) -> None:
        self.model, self.engine, self.changed_only = model, engine, changed_only
        self.pushes: list[Push] = []
        self._sent: dict[str, torch.Tensor] = {}  # as the engine has them
        self._adapters: tuple[str, ...] = ()
        self._everything: str | None = "first"  # why the next push has to send everything
        if engine is None:
            return
        weights, held = PolicyWeights(model), engine.names()
        for name in weights.changing:
            if held_as(name, held) is None:
                raise ValueError(
                    f"{engine.name} has no parameter {name}, alone or fused with others, so that its digest cannot be "
                    "checked; leave out sync_trained_layer."
                )
            if not engine.takes_tensors and math.prod(weights.shape(name)) > torch.iinfo(torch.int32).max:
                raise ValueError(
                    f"{name} has more entries than the int32 positions of vLLM's backend sparse_nccl can tell; start the "
                    "server with the backend nccl."
                )
        if changed_only and not engine.takes_entries:
            warnings.warn(
                f"{engine.name} takes whole tensors only, so every tensor with a changed entry is sent whole; see "
                "'With vLLM' in docs/trainers.md.",
                stacklevel=3,
            )

    def forget(self, why: str = "sleep") -> None:
        """Send everything with the next push: the engine has lost its weights."""
        self._everything = why

    def push(self) -> None:
        """Bring the engine to the policy's weights, and check that it is there.

        Raises:
            RuntimeError: its digests differ also after everything was sent.
        """
        if self.engine is None:
            return
        weights = PolicyWeights(self.model)
        names = list(dict.fromkeys([*weights.changing, *self._sent]))
        now = {name: self._in_engine(weights, name).clone() for name in names}
        why, self._everything = self._everything, "error"  # if it fails, nobody knows what the engine has
        if why is None:
            self._push_block(weights, now)
        else:
            self._push_everything(weights, why)
        if wrong := self._differing(weights, names):
            warnings.warn(
                f"push {len(self.pushes)}: the digests of {len(wrong)} tensors of {self.engine.name} are not the policy's "
                f"(first: {wrong[0]}), so everything is sent again.",
                stacklevel=2,
            )
            self._push_everything(weights, "digest")
            if wrong := self._differing(weights, names):
                raise RuntimeError(
                    f"{self.engine.name} has other weights than the policy, also after everything was sent again: "
                    f"{len(wrong)} tensors differ, first {wrong[0]}. Does it hold them in another dtype or quantized?"
                )
        self._sent, self._adapters, self._everything = now, weights.adapters, None

    def _in_engine(self, weights: PolicyWeights, name: str) -> torch.Tensor:
        """The policy's tensor in the engine's dtype."""
        assert self.engine is not None
        return weights[name].to(self.engine.dtype(name, weights.dtype(name)))

    def _push_everything(self, weights: PolicyWeights, why: str) -> None:
        self._send(why, weights, weights.names, {})

    def _push_block(self, weights: PolicyWeights, now: dict[str, torch.Tensor]) -> None:
        """Send of the tensors `now` what may have, or has, changed."""
        assert self.engine is not None
        why = "adapters" if weights.adapters != self._adapters else "changes" if self.changed_only else "block"
        whole, parts = [], {}
        for name, tensor in now.items():
            where = None
            if name in self._sent and why == "changes":
                where = changed(tensor, self._sent[name])
            elif name in self._sent and why == "block":
                where = weights.positions(name)
            if where is not None and not len(where):
                continue
            with_positions = math.inf if where is None else len(where) * (4 + tensor.element_size())
            if where is None or not self.engine.takes_entries:
                whole.append(name)
            elif self.engine.takes_tensors and with_positions >= tensor.nbytes:
                whole.append(name)
            else:
                parts[name] = where
        self._send(why, weights, whole, parts)

    def _send(self, why: str, weights: PolicyWeights, whole: list[str], parts: dict[str, torch.Tensor]) -> None:
        """Send the tensors `whole` and of others `parts`, the entries at flat positions."""
        assert self.engine is not None
        nbytes = count = 0

        def cut() -> Iterator[Entries]:
            nonlocal nbytes, count
            places: dict[str, Any] = parts if self.engine.takes_tensors else {**dict.fromkeys(whole), **parts}
            for name, where in places.items():
                entries = Entries.of(name, self._in_engine(weights, name), where)
                nbytes, count = nbytes + entries.nbytes, count + len(entries.indices)
                yield entries

        if whole and self.engine.takes_tensors:
            rows = [(n, self.engine.dtype(n, weights.dtype(n)), weights.shape(n)) for n in whole]
            nbytes += sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in rows)
            self.engine.send_tensors(manifest_of(rows), ((n, self._in_engine(weights, n)) for n in whole))
        if parts or (whole and not self.engine.takes_tensors):
            self.engine.send_entries(cut())
        self.pushes.append(Push(why, nbytes, len(whole) if self.engine.takes_tensors else 0, count))

    def _differing(self, weights: PolicyWeights, names: Iterable[str]) -> list[str]:
        """The engine's names of the tensors whose digests are not the policy's."""
        assert self.engine is not None
        held = self.engine.digests()
        parts = dict(found for name in names if (found := held_as(name, held)) is not None)
        return [
            name
            for name, of in parts.items()
            if set(held[name]) != {digest(self._in_engine(weights, part) for part in of)}
        ]


class _GenerationSync:
    """Stands in for `VLLMGeneration.sync_weights`."""

    def __init__(self, generation: Any, sync: LayerSync) -> None:
        self.generation, self.sync = generation, sync

    def __call__(self) -> None:
        generation = self.generation
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


class _Transfer:
    """Stands in for AsyncGRPO's `weight_transfer`, with the calls of its `WeightTransferProtocol`."""

    def __init__(self, transfer: Any, sync: LayerSync) -> None:
        self.transfer, self.sync = transfer, sync

    def init_weight_transfer(self) -> None:
        self.transfer.init_weight_transfer()

    def pause(self) -> None:
        self.transfer.pause()

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.sync.push()  # which reads the policy's weights itself, also while TRL has them merged

    def resume(self) -> None:
        self.transfer.resume()

    def destroy(self) -> None:
        self.transfer.destroy()
