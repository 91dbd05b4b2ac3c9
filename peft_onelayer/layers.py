"""Turns what a user calls the layers to train (14, -1, "3,5", "8-13", "middle", "mid-5") into block indices."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence

LAYER_FORMS = 'an index, a list of indices, a range such as "8-13", "middle", "mid-5", or several of these as "3,8-10"'

Layers = int | str | Sequence[int]
Part = int | tuple[str, int, int]  # an index, ("range", first, last), or ("mid", k, 0), where k = 0 is "middle"


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


def resolve_layers(layer: Layers, num_layers: int) -> list[int]:
    """Turn a layer specification into ascending block indices 0 <= i < `num_layers`.

    "middle" is block num_layers // 2. "mid-k" is the paper's rule without profiling (arXiv 2607.01232):
    the blocks floor(L/2 - k/2) <= i < floor(L/2 + k/2).

    >>> resolve_layers(-1, 28), resolve_layers("middle", 28), resolve_layers("8-10", 28)
    ([27], [14], [8, 9, 10])
    >>> resolve_layers("mid-5", 28), resolve_layers("0, 8-9, -1", 28)
    ([11, 12, 13, 14, 15], [0, 8, 9, 27])

    Raises:
        ValueError: malformed, out of range, empty, or naming one block twice.
    """
    indices = [index for part in parse_layers(layer) for index in _indices(part, layer, num_layers)]
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
    near = difflib.get_close_matches(text, ["middle", "mid-5"], n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise ValueError(f"layer={layer!r} is not understood; expected {LAYER_FORMS}.{hint}")


def _index(item: object, layer: object) -> int:
    try:
        if isinstance(item, bool):
            raise TypeError
        return operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"layer={layer!r} is not understood; expected {LAYER_FORMS}.") from None


def _indices(part: Part, layer: Layers, num_layers: int) -> Sequence[int]:
    if isinstance(part, int):
        return [part]
    kind, first, last = part
    if kind == "range":
        return range(first, last + 1) if last < num_layers else [last]  # out of range, which one of them shows
    if first == 0:
        return [num_layers // 2]
    if first > num_layers:
        raise ValueError(f"layer={layer!r} asks for {first} of {num_layers} blocks.")
    return range((num_layers - first) // 2, (num_layers + first) // 2)
