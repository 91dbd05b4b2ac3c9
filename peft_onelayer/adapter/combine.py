"""Makes one adapter of several that were trained on one base: of different blocks, or of one block by a formula.

The adapters' files and the base's are read in pieces of a tensor, and the result is written as it comes.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.adapter_config import CombinedRecord, Part
from peft_onelayer.records.fields import without_missing_parts
from peft_onelayer.records.files import (
    CONFIG,
    WEIGHTS,
    check_file,
    check_folder,
    file_digest,
    output,
    staged_directory,
    whole_file,
)
from peft_onelayer.records.locate import adapter_folder, hub_identity, last_part
from peft_onelayer.sparse.names import TRAINED

from .checkpoint import Checkpoint
from .largest import PASSES, Largest, Walk
from .parts import Parts
from .reader import open_adapter
from .stored import DTYPES, header

if TYPE_CHECKING:
    import torch

    from .parts import Pieces

METHODS = ("stack", "sum", "average", "slerp", "ties", "dare", "cpi")
DENSITY = {"ties": 0.2, "dare": 0.5}
PREFIX = "base_model.model."
STORED = {name: stored for stored, name in DTYPES.items()}


@dataclass(frozen=True)
class Combined:
    """What `combine_adapters` wrote; `to_json` is what `onelayer combine --json` prints.

    Attributes:
        folder: the new adapter.
        base: of all adapters.
        method: one of `METHODS`.
        adapters: as they were given.
        layers: the blocks of the result, ascending.
        tensors: of the result.
        entries: of these tensors.
        changed: of each adapter, entries with another value in the base's dtype.
        changed_by_several: entries that two adapters or more changed.
        conflicts: of these, entries that they moved in different directions.
        result_changed: entries of the result with another value than in the base.
        cores: of "cpi", of each adapter the entries of its core region.
        overlaps: of "cpi", the Jaccard overlap of each two core regions.
        groups: of "cpi", the adapters whose core regions overlap, counted from 0 in the order given.
    """

    folder: Path
    base: Path
    method: str
    adapters: list[str]
    layers: list[int]
    tensors: int
    entries: int
    changed: list[int]
    changed_by_several: int
    conflicts: int
    result_changed: int
    cores: list[int] | None = None
    overlaps: list[list[float]] | None = None
    groups: list[list[int]] | None = None

    @property
    def conflict_share(self) -> float | None:
        """`conflicts` over `changed_by_several`; None where no entry was changed by several."""
        return self.conflicts / self.changed_by_several if self.changed_by_several else None

    def to_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        paths = {"folder": str(self.folder), "base": str(self.base)}
        return {"format": "onelayer-combine-1", **fields, **paths, "conflict_share": self.conflict_share}


def combine_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    method: str = "stack",
    *,
    base: str | Path | None = None,
    density: float | None = None,
    seed: int = 0,
    core: float = 0.01,
    overlap: float = 0.1,
    mask_out: str | Path | None = None,
    revision: str | None = None,
    allow_other_base: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Combined:
    """Write one adapter that has what several adapters of one base learned.

    - "stack": adapters of different blocks, each block as it is.
    - "sum", "average": W_0 + sum_i (W_i - W_0), or the sum over their number.
    - "slerp": spherical interpolation of the weights, each tensor as one vector, halfway; of more than two one after
      another, so that each counts alike.
    - "ties", "dare": PEFT's own functions, on the changes, with weights of 1.
    - "cpi": CPI-FT (arXiv 2508.21741). The core region of an adapter is the share `core` of its entries that changed
      most. Each core entry takes its task's value, the others are SLERP, beginning with the last adapter.

    An adapter that does not train a tensor leaves it as it is in the base. Formulas are in float64, of a dense adapter
    on its masters, and rounded once to the base's dtype. A piece of one tensor of every adapter is in memory at a time;
    "ties" and "dare" hold one adapter's whole tensor where they choose what is kept, and a sparse adapter is decoded a
    tensor at a time. The result is a dense adapter in the base's dtype, and adapter_config.json has a record of its
    parts, `combined`.

    Args:
        adapters: two or more folders or Hub ids, dense or sparse, of one base.
        out: a folder that does not exist yet, or an empty one.
        method: one of `METHODS`.
        base: folder or Hub id of the base's checkpoint; default, what the first adapter was trained on.
        density: of "ties" and "dare": the share of each tensor's change that is kept; default .2 and .5.
        seed: of what "dare" drops.
        core: of "cpi": share of an adapter's entries.
        overlap: of "cpi": Jaccard overlap of core regions from which on two tasks are of one group.
        mask_out: of "cpi": file for the mask of all entries that are in no core region, for a further training of the
            merged model (`SingleLayerConfig(mask=...)`).
        revision: branch, tag or commit of `base` on the Hub; default, the commit that the first adapter records.
        allow_other_base: take `base` although an adapter was trained on another one of the same shapes.
        on_progress: called with the entries read so far and in all.

    Returns:
        What was written.

    Raises:
        ValueError: in one line: fewer than two adapters, an unknown method, other bases or dtypes, another kind of
            adapter, modules beside the blocks, "stack" of adapters that train the same tensors, or NaN or Inf.
        TargetError: `out` may not be used, by `check_folder`, or `mask_out`, by `check_file`, or another process writes
            to `out`.
        DiskFullError: the disk is full.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; expected one of {', '.join(METHODS)}.")
    names = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    if len(names) < 2:
        raise ValueError(f"combining takes two adapters or more, and {len(names)} was given.")
    if density is not None and method not in DENSITY:
        raise ValueError(f"density is of {' and '.join(DENSITY)}, not of {method}.")
    if mask_out is not None and method != "cpi":
        raise ValueError(f"a mask of what is in no core region is of cpi, not of {method}.")
    for what, value in (("density", density), ("core", core), ("overlap", overlap)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{what}={value} is no share; expected a number above 0, at most 1.")
    check_folder(Path(out))  # before anything is downloaded
    if mask_out is not None:
        check_file(Path(mask_out))
    with output(Path(out)):
        folders = [adapter_folder(name) for name in names]
        files = [open_adapter(folder) for folder in folders]
        parts = Parts(
            files,
            Checkpoint(files[0].base_folder(base, "onelayer combine ... --base {base}", revision)),
            allow_other_base,
            on_progress,
        )
        if method == "stack":
            parts.refuse_common_tensors()
        parts.expected = _entries_to_read(parts, method, mask_out is not None)
        labels = [str(name) for name in names]
        record = CombinedRecord(method, [Part(_public(file), file_digest(file / WEIGHTS)) for file in folders])
        cores = _Cores(parts, core, overlap) if method == "cpi" else None
        kept = DENSITY.get(method, 1.0) if density is None else density
        with staged_directory(Path(out)) as staging:
            counts = _write(parts, staging, method, kept, seed, cores, None if mask_out is None else Path(mask_out))
            config = parts.config() | {"combined": without_missing_parts(record)}
            (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        found: dict[str, Any] = (
            {} if cores is None else {"cores": cores.sizes, "overlaps": cores.overlaps, "groups": cores.groups}
        )
        return Combined(
            folder=Path(out),
            base=parts.checkpoint.folder,
            method=method,
            adapters=labels,
            layers=parts.layers,
            tensors=len(parts.names),
            entries=parts.entries,
            **counts,
            **found,
        )


class _Cores:
    """The core regions of CPI-FT: of each adapter the entries of its tensors that changed most."""

    def __init__(self, parts: Parts, share: float, threshold: float) -> None:
        self.parts = parts
        entries = [sum(math.prod(parts.shape(name)) for name in file.names) for file in parts.files]
        self.largest = [
            Largest(partial(self._scores, i), max(1, round(share * entries[i]))) for i in range(len(parts.files))
        ]
        n = len(parts.files)
        both = [[0] * n for _ in range(n)]
        walks = self.walks()
        for name in parts.names:
            for _, _, cores in self.split(walks, name, parts.pieces(name)):
                for i in range(n):
                    for j in range(n):
                        both[i][j] += int((cores[i] & cores[j]).sum())
        self.sizes = [both[i][i] for i in range(n)]
        union = [[both[i][i] + both[j][j] - both[i][j] for j in range(n)] for i in range(n)]
        self.overlaps = [[both[i][j] / union[i][j] if union[i][j] else 0.0 for j in range(n)] for i in range(n)]
        from .fusion import components

        self.groups = components(self.overlaps, threshold)

    def _scores(self, i: int) -> Iterator[Any]:
        for name in self.parts.files[i].names:
            for base, (value,) in self.parts.pieces(name, [i])():
                yield (value - base).abs().numpy()

    def walks(self) -> list[Walk]:
        """Of each adapter, what takes its core entries; to be led over all tensors in the order of the names."""
        return [largest.walk() for largest in self.largest]

    def split(
        self, walks: Sequence[Walk], name: str, pieces: Pieces
    ) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]]:
        """Of each piece of a tensor, the base's values, the adapters', and which entries are of each adapter's core."""
        import torch

        for base, values in pieces():
            cores = [torch.zeros(base.shape, dtype=torch.bool) for _ in values]
            for i, file in enumerate(self.parts.files):
                if name in file.keys:
                    cores[i] = torch.from_numpy(walks[i]((values[i] - base).abs().numpy()))
            yield base, values, cores


def _entries_to_read(parts: Parts, method: str, mask: bool) -> int:
    """Over all passes, for the progress."""
    others = len(parts.files) - 1
    own = sum(math.prod(parts.shape(name)) for file in parts.files for name in file.names)
    alone = len(parts.files) * parts.entries
    passes = {"slerp": 1 + 2 * others, "cpi": 2 + 2 * others + mask}
    chosen = {"ties": alone, "dare": alone, "cpi": PASSES * own}
    return passes.get(method, 1) * parts.entries + chosen.get(method, 0)


def _write(
    parts: Parts, folder: Path, method: str, density: float, seed: int, cores: _Cores | None, mask_out: Path | None
) -> dict[str, Any]:
    """Write the weights, and what is counted on the way."""
    import torch

    changed, several, conflicts, result_changed = [0] * len(parts.files), 0, 0, 0
    walks = [] if cores is None else cores.walks()
    head = {_key(name): (STORED[parts.dtypes[name]], parts.shape(name)) for name in parts.names}
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header(head))
        for index, name in enumerate(parts.names):
            dtype = getattr(torch, parts.dtypes[name])
            for base, values, value in _fused(parts, name, method, density, seed + index, cores, walks):
                if not torch.isfinite(result := value.to(dtype)).all():
                    raise ValueError(
                        f"{method} gives NaN or Inf in {name}: its values do not fit {parts.dtypes[name]}."
                    )
                signs = torch.stack([(v.to(dtype).double() - base).sign() for v in values])
                moved = signs != 0
                changed = [count + int(m.sum()) for count, m in zip(changed, moved, strict=True)]
                several += int((moved.sum(0) > 1).sum())
                conflicts += int(((signs.amax(0) > 0) & (signs.amin(0) < 0)).sum())
                result_changed += int((result.double() != base).sum())
                file.write(result.contiguous().view(torch.uint8).numpy().data)
    if mask_out is not None and cores is not None:
        _write_mask(parts, cores, mask_out)
    return {
        "changed": changed,
        "changed_by_several": several,
        "conflicts": conflicts,
        "result_changed": result_changed,
    }


def _fused(
    parts: Parts, name: str, method: str, density: float, seed: int, cores: _Cores | None, walks: list[Walk]
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]:
    """Of each piece of a tensor the base's values, the adapters', and the result, all float64."""
    from .fusion import arcs, fuser, outside, transplant

    pieces = parts.pieces(name)
    if method == "stack":
        (trained,) = [i for i, file in enumerate(parts.files) if name in file.keys]
        for base, values in pieces():
            yield base, values, values[trained]
    elif cores is None:
        alone = [parts.pieces(name, [i]) for i in range(len(parts.files))]
        fuse = fuser(method, pieces, alone, math.prod(parts.shape(name)), density, seed)
        for base, values in pieces():
            yield base, values, fuse(base, values)
    else:

        def rests() -> Iterator[list[torch.Tensor]]:
            for _, values, of_piece in cores.split([copy.copy(walk) for walk in walks], name, pieces):
                yield outside(values, of_piece)

        steps = arcs(rests)
        for base, values, of_piece in cores.split(walks, name, pieces):
            yield base, values, transplant(values, of_piece, steps)


def _write_mask(parts: Parts, cores: _Cores, path: Path) -> None:
    """The entries that are in no core region."""
    import torch

    walks = cores.walks()
    with output(path), whole_file(path) as staging, staging.open("wb") as file:
        file.write(header({name: ("BOOL", parts.shape(name)) for name in parts.names}))
        for name in parts.names:
            for _, _, of_piece in cores.split(walks, name, parts.pieces(name)):
                file.write((~torch.stack(of_piece).any(0)).numpy().tobytes())


def _key(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}{TRAINED}{leaf}"


def _public(folder: Path) -> str:
    """What is recorded of a part: its id on the Hub, or the last part of its path."""
    return hub_identity(folder)[0] or last_part(str(folder))
