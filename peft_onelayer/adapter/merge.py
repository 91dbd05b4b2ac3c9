"""Merges adapters into a checkpoint on disk, file by file: what `merge_and_unload` and `save_pretrained` would give,
without loading the model.

Every file is copied; in the copies the bytes of the trained tensors are replaced, one tensor in memory at a time. The
arguments, the adapters' files and the base's are checked before torch is imported.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.files import CARD, TargetError, check_folder, output, staged_directory
from peft_onelayer.records.locate import adapter_folder, base_folder, check_order, check_revision, hub_identity
from peft_onelayer.records.text import name_blocks, printable
from peft_onelayer.sparse.base import OTHER_WEIGHTS, WIDTHS, Entries, other_base, positions, what_differs

from .checkpoint import MODEL_CONFIG, Checkpoint
from .merged_card import merged_card
from .reader import AdapterFile, open_adapter
from .stored import DTYPES

if TYPE_CHECKING:
    import torch

FICLONE = 0x40049409  # linux/fs.h; fcntl.FICLONE came with Python 3.12


@dataclass(frozen=True)
class Merged:
    """What a merge wrote; `to_json` is what `onelayer merge --json` prints.

    Attributes:
        folder: the new checkpoint.
        base: the folder it was made from.
        layers: the blocks that changed, ascending.
        tensors: names of the tensors that changed, as the loaded model calls them.
        rewritten: the safetensors files they are in; the others were copied.
        left_out: files of the base that hold its unchanged weights in other formats, which OUT must not.
        bytes: size of all that was written.
        reflinked: whether the copies share their storage with the base until one of them changes.
        unchecked: the base's tensors that could not be compared with the adapters' records, by name, with the reason.
    """

    folder: Path
    base: Path
    layers: list[int]
    tensors: list[str]
    rewritten: list[str]
    left_out: list[str]
    bytes: int
    reflinked: bool
    unchecked: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": "onelayer-merge-1", **asdict(self), "folder": str(self.folder), "base": str(self.base)}


def merge_into_checkpoint(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Write the checkpoint `base` with the weights of `adapters` to the new folder `out`.

    Each trained tensor becomes the adapter's value rounded to the base's dtype, as `merge_and_unload` rounds it. `out`
    appears complete or not at all.

    Several adapters are merged in their order. Each was trained on `base`, or on what the ones before it give: stages,
    one block after another. Their records of the base tell which, so a missing stage or another order is an error.

    Args:
        base: a folder, or a Hub id.
        adapters: one or several folders or Hub ids, the first stage first; two that train the same tensors must be
            stages.
        out: a folder that does not exist yet, or an empty one.
        revision: branch, tag or commit of a Hub id; default, the commit that the adapter was trained on.
        allow_other_base: merge although the adapter was trained on another base of the same shapes.
        on_progress: called with the bytes copied so far and in all.

    Raises:
        ValueError: the base is incomplete, quantized or not stored as transformers loads it; an adapter is damaged or
            made for another base; two adapters train the same tensor and are no stages; a stage is missing or stands
            at the wrong place.
        TargetError: `out` may not be used, by `check_folder`, or another process writes to it.
        DiskFullError: the disk is full.
    """
    names = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    if not names:
        raise ValueError("no adapter was given.")
    check_revision(base, revision)
    check_folder(Path(out))  # before anything is downloaded
    with output(Path(out)):
        return _merge(base, names, Path(out), revision, allow_other_base, on_progress)


def _merge(
    base: str | Path,
    names: Sequence[str | Path],
    out: Path,
    revision: str | None,
    allow_other_base: bool,
    on_progress: Callable[[int, int], None],
) -> Merged:
    check_order(base, names[0], f"{{base}} {{adapter}} {out}")
    files = [open_adapter(adapter_folder(name)) for name in names]
    if revision is None and str(base) == files[0].config.get("base_model_name_or_path"):
        revision = files[0].config.get("revision")
    checkpoint = Checkpoint(base_folder(base, revision))
    for folder in (checkpoint.folder, *(file.folder for file in files)):
        if folder.resolve() in out.resolve().parents:
            raise TargetError(f"{out} is inside {folder}, which stays as it is; choose an output folder outside of it.")
    sources, unchecked = check_stages(files, checkpoint, allow_other_base)
    by_shard: dict[str, list[str]] = {shard: [] for shard in checkpoint.shards}
    for name in sources:
        by_shard[checkpoint.places[checkpoint.stored_as[name]].path.name].append(name)
    others, left_out = checkpoint.other_files()
    others = [name for name in others if name != CARD]
    layers = sorted({layer for file in files for layer in file.layers})
    # What could still go wrong goes wrong first; without its config a folder looks unfinished to the last moment.
    order = sorted(checkpoint.shards, key=lambda shard: not by_shard[shard])
    order += sorted(others, key=lambda name: name == MODEL_CONFIG)
    sizes = {name: (checkpoint.folder / name).stat().st_size for name in order}
    total, done, reflinked = sum(sizes.values()), 0, True
    with staged_directory(out) as staging:
        for name in order:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            if reflinked and not _clone(checkpoint.folder / name, staging / name):
                reflinked = False
                _check_space(staging, total)
            if not reflinked:
                shutil.copyfile(checkpoint.folder / name, staging / name)
            if by_shard.get(name):
                replacements = {tensor: sources[tensor] for tensor in by_shard[name]}
                _replace(checkpoint, staging / name, replacements, allow_other_base)
            done += sizes[name]
            on_progress(done, total)
        card = merged_card(base, checkpoint.folder, names, layers).encode()
        (staging / CARD).write_bytes(card)
    return Merged(
        folder=out,
        base=checkpoint.folder,
        layers=layers,
        tensors=sorted(sources),
        rewritten=[shard for shard in checkpoint.shards if by_shard[shard]],
        left_out=left_out,
        bytes=total + len(card),
        reflinked=reflinked,
        unchecked=unchecked,
    )


def check_stages(
    adapters: Sequence[AdapterFile], checkpoint: Checkpoint, allow_other_base: bool = False
) -> tuple[dict[str, list[AdapterFile]], dict[str, str]]:
    """Check that each adapter was trained on the checkpoint or on what the adapters before it make of it.

    Returns:
        By tensor the adapters that change it, in their order; and names of the tensors outside the trained blocks that
        could not be compared with what an adapter records, with the reason.

    Raises:
        ValueError: as `check_base`; two adapters train the same tensor and are no stages.
    """
    sources: dict[str, list[AdapterFile]] = {}
    changed: dict[str, Entries] = {}
    unchecked: dict[str, str] = {}
    for place, adapter in enumerate(adapters):
        later = adapters[place + 1 :]
        unchecked |= check_base(adapter, checkpoint, allow_other_base, changed, later)
        for name in adapter.names:
            record = None if adapter.trained_on is None else adapter.trained_on.block.get(name)
            if name in sources and not (record and changed[name].equals(record)):
                raise ValueError(
                    f"{sources[name][-1].folder} and {adapter.folder} both train {name}, neither on the result of the "
                    "other; merge adapters of different blocks, or load both with PEFT and use "
                    "merge_and_unload(adapter_names=[...])."
                )
            sources.setdefault(name, []).append(adapter)
        if later:  # what the next ones may have been trained on
            for name in adapter.names:
                value = _value(checkpoint, name, sources[name], allow_other_base)
                changed[name] = Entries(value.flatten()[positions(value.numel())], tuple(value.shape))
    return sources, unchecked


def check_base(
    adapter: AdapterFile,
    checkpoint: Checkpoint,
    allow_other_base: bool = False,
    changed: Mapping[str, Entries] | None = None,
    later: Sequence[AdapterFile] = (),
) -> dict[str, str]:
    """Check that the adapter's tensors all have a place in the checkpoint, and that it is, as far as can be known, the
    one that they were trained on.

    Args:
        adapter: an adapter.
        checkpoint: a base.
        allow_other_base: leave the second check out.
        changed: sampled entries of the tensors that earlier adapters change, by name: the adapter was trained on the
            checkpoint with them or without.
        later: the adapters after it, for the message.

    Returns:
        Names of the tensors outside the trained block that could not be compared, with the reason.

    Raises:
        ValueError: another base.
    """
    from peft_onelayer.tuner import find_decoder_stack

    where, depth = f"the adapter in {adapter.folder}", adapter.config["num_layers"]
    if checkpoint.model is not None:
        found = len(find_decoder_stack(checkpoint.model, adapter.config.get("layers_pattern")).blocks)
        if found != depth:
            raise ValueError(
                f"{where} was made for a model of {depth} blocks and {checkpoint.folder} has {found}: it belongs to "
                f"another base model ({adapter.config.get('base_model_name_or_path')})."
            )
    for name in adapter.names:
        if not adapter.is_trained(name):
            raise ValueError(
                f"{where} also holds {name}, which is no part of the trained block (modules_to_save); load it with "
                "PEFT, merge_and_unload and save_pretrained."
            )
        if name not in checkpoint.stored_as:
            known = checkpoint.model is not None and name in checkpoint.model.state_dict()
            raise ValueError(
                f"{checkpoint.folder} does not store {name} as one tensor, but in a form that transformers converts "
                "when it loads it; load the adapter with PEFT, merge_and_unload and save_pretrained."
                if known
                else f"{checkpoint.folder} holds no {name}, which {where} trains: it was made for another base model."
            )
        place = checkpoint.places[checkpoint.stored_as[name]]
        if not place.is_floating_point:
            raise ValueError(f"{checkpoint.folder} stores {name} as {place.dtype}, which is no floating-point weight.")
    if allow_other_base:
        return {}
    unchecked: dict[str, str] = {}
    if adapter.trained_on is not None:
        comparison = checkpoint.compare(adapter.trained_on, changed).without(
            adapter.config.get("saved_embeddings") or []
        )
        there = adapter.trained_on.tensors
        independent = {
            name
            for name in comparison.other
            if name in (changed or {}) and name in checkpoint.entries and checkpoint.entries[name].equals(there[name])
        }
        other = {name: what for name, what in comparison.other.items() if name not in independent}
        if adapter.sparse is not None:  # its own digests, of every entry, are compared when it is read
            other = {
                name: what
                for name, what in other.items()
                if name not in adapter.sparse.tensors or what != OTHER_WEIGHTS
            }
        if other:
            raise other_base(f"{what_differs(other)}{_missing_stage(adapter, other, later)}", adapter.recorded_base)
        unchecked = {n: why for n, why in comparison.unchecked.items() if n not in adapter.trained_on.block}
    if difference := _other_base(adapter, checkpoint):
        raise ValueError(
            f"{where} was trained on {difference}; if the shapes fit, --allow-other-base takes it all the same."
        )
    return unchecked


def check_unquantized(adapter: AdapterFile, allow_other_base: bool = False) -> None:
    """Check that the adapter's weights began as the base's own, and not as quantized ones, whose rounding would count
    as change where they are compared with the checkpoint's.

    Raises:
        ValueError: they did, unless `allow_other_base`.
    """
    if not adapter.quantized or allow_other_base:
        return
    first, *more = adapter.quantized
    were = f" and {len(more)} more tensor(s) were" if more else " was"
    raise other_base(
        f"its {printable(first, 80)}{were} quantized in training, and that rounding would count as change",
        adapter.recorded_base,
    )


def _missing_stage(adapter: AdapterFile, other: Collection[str], later: Sequence[AdapterFile]) -> str:
    """What to say where the tensors that differ are those of a few blocks: that these were trained before."""
    blocks = {_block(name, adapter) for name in other}
    if None in blocks or len(blocks) >= adapter.config["num_layers"]:
        return ""
    named = name_blocks(block for block in blocks if block is not None)
    given = [file.folder for file in later if blocks & set(file.layers)]
    if given:
        return f"; it was trained after {named}: give {given[0]} before {adapter.folder}"
    return f"; if {named} was trained before, give that adapter too, before {adapter.folder}"


def _block(name: str, adapter: AdapterFile) -> int | None:
    """The index of the block that the tensor `name` of the base belongs to; None outside the stack of blocks."""
    numbers = {str(layer) for layer in adapter.layers}
    for trained in filter(adapter.is_trained, adapter.names):
        parts = trained.split(".")
        depth = next((i for i, part in enumerate(parts) if part in numbers), len(parts))
        own = name.split(".")
        if own[:depth] == parts[:depth] and len(own) > depth and own[depth].isdecimal():
            return int(own[depth])
    return None


def _other_base(adapter: AdapterFile, checkpoint: Checkpoint) -> str | None:
    """In words what the adapter was trained on, if that is known to be another base than `checkpoint`."""
    if adapter.sparse is not None:
        return None  # it carries digests of the base's tensors, which are checked when they are read
    name, commit = adapter.config.get("base_model_name_or_path"), adapter.config.get("revision")
    if name and adapter.trained_on is not None and Path(name).is_dir():
        return None  # compared already
    hub_id, hub_commit = hub_identity(checkpoint.folder)
    if name and Path(name).is_dir():
        import torch

        folder = Path(name)
        if folder.resolve() == checkpoint.folder.resolve():
            return None
        trained_on = Checkpoint(folder)
        same = all(
            tensor in trained_on.stored_as
            and torch.equal(
                trained_on.read(trained_on.stored_as[tensor]), checkpoint.read(checkpoint.stored_as[tensor])
            )
            for tensor in adapter.names
        )
        return None if same else f"{folder}, whose weights differ from those in {checkpoint.folder}"
    if hub_id and name and hub_id != name:
        return f"{name}, and {checkpoint.folder} is {hub_id}"
    if hub_commit and commit and hub_commit != commit:
        return f"{name} at commit {commit}, and {checkpoint.folder} is at {hub_commit}"
    return None


def effective_tensor(
    adapter: AdapterFile, name: str, base: torch.Tensor, allow_other_base: bool = False
) -> torch.Tensor:
    """The trained tensor `name` in the dtype of `base`, the checkpoint's tensor; of a dense adapter that is all that
    counts of `base`, which may be on the meta device.

    Raises:
        ValueError: as `AdapterFile.tensor`.
    """
    import torch

    trained_on = base
    if adapter.sparse is not None:  # its changes are those of the base in the dtype that it was loaded in for training
        trained_on = base.to(getattr(torch, adapter.sparse.tensors[name].dtype))
    return adapter.tensor(name, trained_on, allow_other_base).to(base.dtype)


def as_trained(
    adapter: AdapterFile, name: str, checkpoint: Checkpoint, allow_other_base: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained tensor `name` and the base's, both in the dtype of `trained_dtype`.

    Raises:
        ValueError: as `AdapterFile.tensor`.
    """
    import torch

    base = checkpoint.read(checkpoint.stored_as[name]).to(getattr(torch, trained_dtype(adapter, name, checkpoint)))
    return adapter.tensor(name, base, allow_other_base), base


def trained_dtype(adapter: AdapterFile, name: str, checkpoint: Checkpoint) -> str:
    """The dtype, as torch calls it, in which the checkpoint's tensor `name` is the base of the adapter: the one that it
    was loaded in for training. It is the stored one where none is recorded, and where that was wider and the checkpoint
    is a rounded copy of the base."""
    stored, recorded = checkpoint.dtype(name), adapter.base_dtype(name)
    if recorded is None:
        return stored
    if adapter.trained_on is not None and adapter.sparse is None and WIDTHS[recorded] > WIDTHS[stored]:
        digest = adapter.trained_on.block[name].digests[recorded]
        return recorded if checkpoint.entries[name].digest(recorded) == digest else stored
    return recorded


def _replace(checkpoint: Checkpoint, copy: Path, sources: dict[str, list[AdapterFile]], allow_other_base: bool) -> None:
    """Write the adapters' tensors over the base's in `copy`, a copy of a safetensors file of `checkpoint`."""
    import torch

    with copy.open("r+b") as file:
        for name, adapters in sources.items():
            value = _value(checkpoint, name, adapters, allow_other_base)
            file.seek(checkpoint.places[checkpoint.stored_as[name]].start)
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def _value(checkpoint: Checkpoint, name: str, adapters: Sequence[AdapterFile], allow_other_base: bool) -> torch.Tensor:
    """What the adapters, one after another, make of the checkpoint's tensor `name`."""
    import torch

    place = checkpoint.places[checkpoint.stored_as[name]]
    if adapters[0].sparse is not None:
        value = checkpoint.read(checkpoint.stored_as[name])
    else:
        value = torch.empty(place.shape, dtype=getattr(torch, DTYPES[place.dtype]), device="meta")
    for adapter in adapters:
        value = effective_tensor(adapter, name, value, allow_other_base)
    return value


def _clone(source: Path, target: Path) -> bool:
    """Make `target` a copy-on-write clone of `source`, if their file system can."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
            return True
        except OSError:  # another file system, or one without clones
            target.unlink()  # ext4 would flush a file that was emptied before it was written, when it is closed
            return False


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free / 1e9:.2f} GB free and the merged model takes {needed / 1e9:.2f} GB.")
