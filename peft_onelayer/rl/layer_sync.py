"""Keeping an engine at the weights of a policy: what is sent of the trained block, and the check that it arrived."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from .engines import Engine, manifest_of
from .policy_weights import Entries, PolicyWeights, changed, digest, held_as

INDEX_BYTES = 4  # of a position, int32
POSITIONS = 2**31  # that int32 can tell
PARTIAL = ("adapters", "block", "changes")  # pushes of less than everything


@dataclass(frozen=True)
class Push:
    """What one push sent.

    Attributes:
        why: "first", "sleep", "restart", "digest" or "error": everything. "adapters": the tensors of the blocks whole.
            "block": what trains of them. "changes": what has changed.
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
        self._rest: dict[str, list[str]] = {}  # digests that it told of other parameters, after everything was sent
        self._unlike: set[str] = set()  # those among them that it has in a form of its own
        self._adapters: tuple[str, ...] = ()
        self._everything: str | None = "first"  # why the next push has to send everything
        if engine is None:
            return
        weights, self._held = PolicyWeights(model), set(engine.names())
        for name in [*weights.changing, *weights.untied]:
            if held_as(name, self._held) is None and weights.untied:
                raise ValueError(
                    f"{engine.name} has no parameter {name}: it ties the head to the embeddings, of which "
                    "modules_to_save trains one apart from the other; leave that one out of modules_to_save, or serve "
                    "a checkpoint with both and tie_word_embeddings=false."
                )
            if held_as(name, self._held) is None:
                raise ValueError(
                    f"{engine.name} has no parameter {name}, alone or fused with others, so that its digest cannot be "
                    "checked; leave out sync_trained_layer."
                )
        for name in weights.names:
            if not engine.takes_tensors and math.prod(weights.shape(name)) > POSITIONS:
                raise ValueError(
                    f"{name} has more entries than vLLM's backend sparse_nccl can tell with positions in int32; start "
                    "the server with the backend nccl."
                )
        if changed_only and not engine.takes_entries:
            warnings.warn(
                f"{engine.name} takes whole tensors only, so every tensor with a changed entry is sent whole; see "
                "'With vLLM' in docs/trainers.md.",
                stacklevel=3,
            )

    def forget(self, why: str = "sleep") -> None:
        """Send everything with the next push: the engine has lost its weights."""
        self._everything = self._everything or why

    def push(self) -> None:
        """Bring the engine to the policy's weights, and check that it is there.

        Raises:
            RuntimeError: its digests differ also after everything was sent twice.
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
        tries = 0 if why is None else 1
        while wrong := self._differing(weights, names):
            if tries == 2:
                self._refuse_or_accept(wrong, self._parts(names))
                break
            warnings.warn(
                f"push {len(self.pushes)}: the digests of {len(wrong)} tensors of {self.engine.name} are not the "
                f"policy's (first: {wrong[0]}), so everything is sent again.",
                stacklevel=2,
            )
            self._push_everything(weights, "digest")
            tries += 1
        self._sent, self._adapters, self._everything = now, weights.adapters, None

    def _refuse_or_accept(self, wrong: list[str], block: Collection[str]) -> None:
        """Raise RuntimeError for a tensor of the block; take the others for right, in a form of the engine's own."""
        assert self.engine is not None
        if of_block := [name for name in wrong if name in block]:
            raise RuntimeError(
                f"{self.engine.name} has other weights than the policy, though everything was sent twice: "
                f"{len(of_block)} tensors differ, first {of_block[0]}. Does it hold them in another dtype or quantized?"
            )
        self._unlike.update(wrong)
        warnings.warn(
            f"{self.engine.name} has {len(wrong)} tensors that adapters do not change, first {wrong[0]}, in a form of "
            "its own (padded, or in another dtype), so that only later changes of them are found.",
            stacklevel=3,
        )

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
            if where is not None and self.engine.takes_entries and tensor.numel() <= POSITIONS:
                nbytes = len(where) * (INDEX_BYTES + tensor.element_size())
                if nbytes < tensor.nbytes or not self.engine.takes_tensors:
                    parts[name] = where
                    continue
            whole.append(name)
        self._send(why, weights, whole, parts)

    def _send(self, why: str, weights: PolicyWeights, whole: list[str], parts: dict[str, torch.Tensor]) -> None:
        """Send the tensors `whole` and of others `parts`, the entries at flat positions."""
        assert self.engine is not None
        engine, nbytes, count = self.engine, 0, 0

        def cut() -> Iterator[Entries]:
            nonlocal nbytes, count
            places: dict[str, Any] = parts if engine.takes_tensors else {**dict.fromkeys(whole), **parts}
            for name, where in places.items():
                entries = Entries.of(name, self._in_engine(weights, name), where)
                nbytes, count = nbytes + entries.nbytes, count + len(entries.indices)
                yield entries

        if whole and engine.takes_tensors:
            rows = [(n, engine.dtype(n, weights.dtype(n)), weights.shape(n)) for n in whole]
            nbytes += sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in rows)
            engine.send_tensors(manifest_of(rows), ((n, self._in_engine(weights, n)) for n in whole))
        if parts or (whole and not engine.takes_tensors):
            engine.send_entries(cut())
        self.pushes.append(Push(why, nbytes, len(whole) if engine.takes_tensors else 0, count))

    def _parts(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The engine's names of the policy's tensors `names`, with all tensors that the engine holds under them."""
        return dict(held_as(name, self._held) or (name, []) for name in names)

    def _differing(self, weights: PolicyWeights, names: Iterable[str]) -> list[str]:
        """The engine's names of the tensors whose digests are not the policy's.

        Of what adapters cannot change, a server tells the digests, too. They are compared with the policy's after
        everything was sent, and with themselves later on.
        """
        assert self.engine is not None
        everything = self.pushes[-1].why not in PARTIAL
        parts = self._parts(names)
        told = self.engine.digests(parts)
        comparable = self._parts(weights.names) if everything else parts
        wrong = [name for name in parts if name not in told]
        for name, digests in told.items():
            if name in comparable and name not in self._unlike:
                expected = {digest(self._in_engine(weights, part) for part in comparable[name])}
                right = set(digests) == expected
            else:
                right = everything or set(self._rest.get(name, ())) == set(digests)
            if not right:
                wrong.append(name)
        if everything:
            self._rest = {name: digests for name, digests in told.items() if name not in parts}
        return wrong
