"""Turns what a user calls the layers to train (14, -1, "3,5", "8-13", "middle", "mid-5", "top-5@ranking.json",
"full_attention", "all") into block indices."""

from __future__ import annotations

import difflib
import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYER_FORMS = (
    'an index, a list of indices, a range such as "8-13", "middle", "mid-5", "top-5@ranking.json", '
    '"worst-5@ranking.json", a kind such as "full_attention", "all", or several of these as "3,8-10"'
)
RANKING_LIMIT = 32 * 2**20  # bytes of a ranking's file
KINDS = r"\w+_attention|attention|conv|mamba|moe|hybrid"  # as configurations call them in `layer_types`

Layers = int | str | Sequence[int]
# An index, ("range", first, last), ("mid", k, 0), where k = 0 is "middle", ("top" or "worst", k, file), ("kind", name,
# 0), or ("all", 0, 0).
Part = int | tuple[str, Any, Any]


def parse_layers(layer: Layers) -> list[Part]:
    """The parts of a layer specification; the number of blocks is not needed for that.

    Raises:
        ValueError: the form is not one of `LAYER_FORMS`, or nothing is named.
    """
    if isinstance(layer, str):
        return [_parse_part(part.strip(), layer) for part in layer.split(",")]
    indices = plain_indices(layer)
    return [*indices] if isinstance(indices, list) else [indices]


def plain_indices(layer: int | Sequence[int]) -> int | list[int]:
    """`layer` as plain integers: a NumPy integer cannot be written to adapter_config.json.

    Raises:
        ValueError: no integer and no list of integers, or an empty list.
    """
    if not isinstance(layer, Sequence) or isinstance(layer, (str, bytes)):
        return _index(layer, layer)
    if not layer:
        raise ValueError(f"layer={layer!r} is empty; expected {LAYER_FORMS}.")
    return [_index(item, layer) for item in layer]


def resolve_layers(layer: Layers, num_layers: int, kinds: Sequence[str] | None = None) -> list[int]:
    """Turn a layer specification into ascending block indices 0 <= i < `num_layers`.

    "middle" is block num_layers // 2. "mid-k" is the paper's rule without profiling (arXiv 2607.01232):
    the blocks floor(L/2 - k/2) <= i < floor(L/2 + k/2). "top-k@FILE" and "worst-k@FILE" are the first and the last k of
    the measured blocks in a ranking or a layer profile, of which the pick is the first.

    Args:
        layer: the specification.
        num_layers: of the model.
        kinds: of its blocks, the field `layer_types` of its configuration; None where it has none.

    >>> resolve_layers(-1, 28), resolve_layers("middle", 28), resolve_layers("8-10", 28)
    ([27], [14], [8, 9, 10])
    >>> resolve_layers("mid-5", 28), resolve_layers("0, 8-9, -1", 28)
    ([11, 12, 13, 14, 15], [0, 8, 9, 27])

    Raises:
        ValueError: malformed, out of range, empty, or naming one block twice; a file that is no ranking of a model of
            this depth or that has too few blocks; a kind that the model has not.
    """
    if num_layers < 1:
        raise ValueError("the model has no blocks; its configuration should name at least one.")
    indices = [index for part in parse_layers(layer) for index in _indices(part, layer, num_layers, kinds)]
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"layer={layer!r} is out of range: the model has {num_layers} blocks, "
                f"so an index is 0 to {num_layers - 1} (or -{num_layers} to -1)."
            )
    indices = [index % num_layers for index in indices]
    if len(set(indices)) < len(indices):
        raise ValueError(f"layer={layer!r} names a block twice (counted from 0: {indices}); name each block once.")
    return sorted(indices)


def may_name(layer: Layers, indices: list[int], num_layers: int) -> bool:
    """Whether a specification can have been resolved to these ascending block indices.

    A kind can, whatever the blocks: models of one depth may call them otherwise. A ranking's file cannot, since what
    it was resolved to takes its place (`names_a_file`); it is not read.

    >>> may_name("middle", [2], 4), may_name(3, [1], 4)
    (True, False)

    Raises:
        ValueError: as `resolve_layers`.
    """
    parts = [part for part in parse_layers(layer) if not isinstance(part, int)]
    if any(kind in ("kind", "top", "worst") for kind, _, _ in parts):
        return not names_a_file(layer)
    return resolve_layers(layer, num_layers) == indices


def _parse_part(text: str, layer: str) -> Part:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ValueError(f"layer={layer!r} is an empty range; write it as {last}-{first}.")
        return ("range", first, last)
    if text == "middle":
        return ("mid", 0, 0)
    if match := re.fullmatch(r"mid-(\d+)", text):
        if int(match[1]) < 1:
            raise ValueError(f"layer={layer!r} selects no block; use mid-1 or more.")
        return ("mid", int(match[1]), 0)
    if match := re.fullmatch(r"(top|worst)-(\d+)@(.+)", text):
        if int(match[2]) < 1:
            raise ValueError(f"layer={layer!r} selects no block; use {match[1]}-1 or more.")
        return (match[1], int(match[2]), match[3])
    if re.fullmatch(r"(top|worst)-\d+", text):
        raise ValueError(f"layer={layer!r} lacks the ranking that it counts in; write it as {text}@ranking.json.")
    if text == "all":
        return ("all", 0, 0)
    if re.fullmatch(KINDS, text):
        return ("kind", text, 0)
    near = difflib.get_close_matches(text, ["middle", "mid-5", "full_attention", "linear_attention"], n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise ValueError(f"layer={layer!r} is not understood; expected {LAYER_FORMS}.{hint}")


def _index(item: object, layer: object) -> int:
    try:
        if isinstance(item, bool):
            raise TypeError
        return operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"layer={layer!r} is not understood; expected {LAYER_FORMS}.") from None


def check_layers(layer: Layers) -> None:
    """What can be told of a layer specification before there is a model.

    Raises:
        ValueError: malformed, or a file that is no ranking or has too few blocks.
    """
    for part in parse_layers(layer):
        if not isinstance(part, int) and part[0] in ("top", "worst"):
            _indices(part, layer, None, None)


def names_a_file(layer: Layers) -> bool:
    """Whether a layer specification reads a ranking's file, so that it means nothing on another machine."""
    return isinstance(layer, str) and "@" in layer


def ranking_without_gain(layer: Layers) -> str | None:
    """The file of a "top-k@FILE" whose race or sweep found no block that gains beyond noise; None without one."""
    for part in parse_layers(layer):
        if not isinstance(part, int) and part[0] == "top":
            fields = json.loads(Path(part[2]).expanduser().read_text(encoding="utf-8"))
            if fields.get("pick", 0) is None:  # a published profile has none
                return part[2]
    return None


def _indices(part: Part, layer: Layers, num_layers: int | None, kinds: Sequence[str] | None) -> Sequence[int]:
    if isinstance(part, int):
        return [part]
    kind, first, last = part
    if kind in ("top", "worst"):
        order = _ranked(last, layer, num_layers)
        if first > len(order):
            raise ValueError(f"layer={layer!r} asks for {first} blocks and {last} ranks {len(order)}.")
        return order[:first] if kind == "top" else order[-first:]
    assert num_layers is not None
    if kind == "all":
        return range(num_layers)
    if kind == "kind":
        found = [index for index, name in enumerate(kinds or []) if name == first]
        if not found:
            has = f"of {', '.join(sorted(set(kinds)))}" if kinds else "whose configuration names no kinds"
            raise ValueError(f"layer={layer!r} names no block of this model {has}.")
        return found
    if kind == "range":
        return range(first, last + 1) if last < num_layers else [last]  # out of range, which one of them shows
    if first == 0:
        return [num_layers // 2]
    if first > num_layers:
        raise ValueError(f"layer={layer!r} asks for {first} of {num_layers} blocks.")
    return range((num_layers - first) // 2, (num_layers + first) // 2)


def _ranked(file: str, layer: Layers, num_layers: int | None) -> list[int]:
    """The measured blocks of a ranking or a layer profile, the pick first: of a race a block that never ran may be the
    best by its neighbours."""
    path = Path(file).expanduser()
    try:
        if not path.is_file() or path.stat().st_size > RANKING_LIMIT:
            raise ValueError
        fields = json.loads(path.read_text(encoding="utf-8"))
        order, depth, pick = fields.get("order"), fields["num_layers"], fields.get("pick")
        if order is None:  # a published profile
            worth = {k: float(value) for k, value in enumerate(fields["contribution"]) if value is not None}
            order = sorted(worth, key=lambda k: -worth[k])
        blocks = sorted((_index(k, layer) for k in order), key=lambda k: k != pick)
        if type(depth) is not int or len(set(blocks)) < len(blocks) or not all(0 <= k < depth for k in blocks):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"layer={layer!r}: {file} is no ranking; give what `onelayer probe --out` or `onelayer sweep` wrote."
        ) from None
    if depth != (num_layers or depth):
        raise ValueError(f"layer={layer!r}: {file} ranks the blocks of a model of {depth}, not {num_layers}.")
    return blocks
