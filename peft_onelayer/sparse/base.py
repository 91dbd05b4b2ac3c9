"""What adapter_config.json records of the base that an adapter was trained on: samples of all its tensors.

Every encoding carries this record, in the field `trained_on`. It tells another base from the same one in another dtype
and names the tensors that differ. Of a tensor up to `RUNS` x `RUN` entries are looked at: all of a small one, and of a
larger one `RUNS` runs of `RUN` neighbours, the first and the last entries among them; none of a quantized one. Reading
and checking a record imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.fields import read
from peft_onelayer.records.privacy import OF_TENSOR
from peft_onelayer.records.text import name_blocks, printable

from .digest import dtype_name

if TYPE_CHECKING:
    import torch

FORMAT = "onelayer-base-1"
RUNS, RUN = 64, 64
WIDTHS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}
NARROW = ("bfloat16", "float16")
QUANTIZED = "quantized"  # in the place of a dtype
OTHER_WEIGHTS = "holds other weights"


@dataclass(frozen=True)
class Stage:
    """Blocks that were trained and merged before.

    Attributes:
        base: name of the model that they were merged into; None where it has none.
        revision: its commit on the Hub.
        blocks: their indices, ascending.
    """

    base: str | None
    revision: str | None
    blocks: list[int]


@dataclass(frozen=True)
class Sampled:
    """What is recorded of one tensor.

    Attributes:
        dtype: one of `WIDTHS`, or `QUANTIZED`.
        shape: of the whole tensor.
        digests: of the sampled entries by the dtype that they were rounded to: `dtype`, and the narrower ones; none of
            a quantized tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    digests: dict[str, str]

    def to_json(self) -> str:
        sizes = "x".join(map(str, self.shape)) or "scalar"
        return " ".join([self.dtype, sizes, *self.digests.values()])

    @classmethod
    def from_json(cls, text: str) -> Sampled | None:
        """None for another text than `to_json` gives."""
        match = OF_TENSOR.fullmatch(text)
        if match is None or match[1] not in (*WIDTHS, QUANTIZED):
            return None
        kinds, digests = _kinds(match[1]), match[3].split()
        if len(kinds) != len(digests):
            return None
        shape = () if match[2] == "scalar" else tuple(int(size) for size in match[2].split("x"))
        return cls(match[1], shape, dict(zip(kinds, digests, strict=True)))


@dataclass(frozen=True)
class BaseRecord:
    """The field `trained_on` of adapter_config.json.

    Attributes:
        block: of the tensors that the adapter trains, by their names in the base.
        rest: of all others, without those of `modules_to_save`, which the adapter holds itself.
        stages: what was merged into the base before.
    """

    block: dict[str, Sampled]
    rest: dict[str, Sampled]
    stages: list[Stage] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, Sampled]:
        """All, by name."""
        return self.rest | self.block

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "block": {name: sample.to_json() for name, sample in self.block.items()},
            "rest": {name: sample.to_json() for name, sample in self.rest.items()},
            "stages": [vars(stage) for stage in self.stages],
        }

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a base with tensors of these shapes has the block's. One that has not is refused when the adapter is
        read, and that message is plainer."""
        return all(name in shapes and shapes[name] == sample.shape for name, sample in self.block.items())

    @classmethod
    def from_json(cls, fields: Any) -> BaseRecord:
        """Check and take the field `trained_on` of adapter_config.json.

        Raises:
            ValueError: another format, or fields that are missing or no such thing.
        """
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            found = fields.get("format") if isinstance(fields, dict) else fields
            raise ValueError(
                f"the adapter's record of its base is {printable(found, 40)!r} and this version reads {FORMAT!r}: "
                "update peft-onelayer."
            )
        parts: list[dict[str, Sampled]] = []
        for part in ("block", "rest"):
            texts = read(dict[str, str], fields.get(part), "adapter_config.json", f"trained_on.{part}")
            samples = {name: Sampled.from_json(text) for name, text in texts.items()}
            if wrong := [name for name, sample in samples.items() if sample is None]:
                raise ValueError(
                    f"adapter_config.json: trained_on.{part} says no dtype, shape and digests of {printable(wrong[0])}."
                )
            parts.append({name: sample for name, sample in samples.items() if sample is not None})
        if not parts[0] or parts[0].keys() & parts[1].keys():
            raise ValueError("adapter_config.json: trained_on.block is empty or repeated in trained_on.rest.")
        stages = read(list[Stage], fields.get("stages", []), "adapter_config.json", "trained_on.stages")
        return cls(parts[0], parts[1], stages)


@dataclass(frozen=True)
class Entries:
    """The sampled entries of a tensor at hand.

    Attributes:
        values: of one dimension, on the CPU, in the tensor's dtype.
        shape: of the whole tensor.
    """

    values: torch.Tensor
    shape: tuple[int, ...]

    @functools.cached_property
    def sampled(self) -> Sampled:
        """What is recorded of it."""
        name = dtype_name(self.values)
        return Sampled(name, self.shape, {kind: self.digest(kind) for kind in _kinds(name)})

    def digest(self, kind: str) -> str:
        """Of the entries rounded to the dtype of this name: the first 16 hexadecimal digits of a SHA-256."""
        import torch

        values = self.values.to(getattr(torch, kind)).contiguous()
        return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    def equals(self, recorded: Sampled) -> bool | None:
        """Whether these are the recorded entries, as far as the two dtypes go; None where they do not tell.

        A wider dtype is rounded to the recorded one, and a narrower one is compared with the recorded entries rounded
        to it. Of bfloat16 and float16 only equal ones tell: a base may have been rounded to each of them on its own.
        """
        if not recorded.digests:
            return None
        here, there = dtype_name(self.values), recorded.dtype
        if here == there or WIDTHS[here] > WIDTHS[there]:
            return self.digest(there) == recorded.digests[there]
        if WIDTHS[here] == WIDTHS[there]:
            same = self.digest(here) == recorded.digests[here] or self.digest(there) == recorded.digests[there]
            return True if same else None
        return self.digest(here) == recorded.digests[here] if here in recorded.digests else None


@dataclass(frozen=True)
class Comparison:
    """How the base at hand compares with the recorded one.

    Attributes:
        other: names of the tensors that differ, with what differs.
        unchecked: names of those that could not be compared, with the reason.
    """

    other: dict[str, str]
    unchecked: dict[str, str]

    def without(self, names: Collection[str]) -> Comparison:
        """The same, of all tensors but these."""
        other = {name: what for name, what in self.other.items() if name not in names}
        return Comparison(other, {name: why for name, why in self.unchecked.items() if name not in names})


def positions(entries: int) -> list[int]:
    """Which of a tensor's entries, counted row by row, are sampled; ascending."""
    if entries <= RUNS * RUN:
        return list(range(entries))
    starts = (k * (entries - RUN) // (RUNS - 1) for k in range(RUNS))
    return list(itertools.chain.from_iterable(range(start, start + RUN) for start in starts))


def compare(
    recorded: Mapping[str, Sampled],
    found: Mapping[str, Entries],
    unavailable: Mapping[str, str],
    embeddings: Collection[str] = (),
) -> Comparison:
    """Compare a base with what is recorded of it.

    Args:
        recorded: by name.
        found: of the tensors at hand that can be read, by name.
        unavailable: the others at hand, with the reason.
        embeddings: names of tensors that may have been resized since.
    """
    other: dict[str, str] = {}
    unchecked: dict[str, str] = {}
    undecided: dict[str, str] = {}
    telling = 0  # tensors that are equal although bfloat16 here was float16 there, or the other way round
    for name, sample in recorded.items():
        entries = found.get(name)
        if entries is None:
            unchecked[name] = unavailable.get(name, "not in the base at hand")
        elif entries.shape != sample.shape:
            resized = name in embeddings and entries.shape[1:] == sample.shape[1:]
            sizes = f"shape {list(entries.shape)}, not {list(sample.shape)}"
            (unchecked if resized else other)[name] = f"resized: {sizes}" if resized else f"has {sizes}"
        elif sample.dtype == QUANTIZED:
            unchecked[name] = "quantized in training"
        elif (same := entries.equals(sample)) is None:
            undecided[name] = f"{dtype_name(entries.values)} here and {sample.dtype} in training"
        elif not same:
            other[name] = OTHER_WEIGHTS
        elif dtype_name(entries.values) != sample.dtype and WIDTHS[dtype_name(entries.values)] == WIDTHS[sample.dtype]:
            telling += bool((entries.values != entries.values[:1]).any())
    if telling > len(undecided):  # so one was made from the other, and all tensors would be equal
        other |= dict.fromkeys(undecided, OTHER_WEIGHTS)
    else:
        unchecked |= undecided
    new = (found.keys() | unavailable.keys()) - recorded.keys()
    return Comparison(other, unchecked | dict.fromkeys(sorted(new), "not in the base of the training"))


def in_words(names: Mapping[str, str]) -> str:
    """The first few of `names` with what is said of them, and how many more there are."""
    few = dict(itertools.islice(names.items(), 3))
    if len(set(few.values())) == 1:
        shown = ", ".join(printable(name, 60) for name in few)
        reason = f" ({printable(next(iter(few.values())), 80)})"
    else:
        shown, reason = ", ".join(f"{printable(name, 60)} ({printable(why, 60)})" for name, why in few.items()), ""
    return shown + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "") + reason


def what_differs(other: Mapping[str, str]) -> str:
    """The tensors of another base in words: the first with what differs, a few more by name, and how many there are."""
    (first, what), *more = sorted(other.items(), key=lambda item: item[1] == OTHER_WEIGHTS)
    names = [printable(name, 60) for name, _ in more[:2]]
    rest = (
        f", and {len(more)} more tensor(s) differ ({', '.join(names)}{', ...' if len(more) > 2 else ''})"
        if more
        else ""
    )
    return f"its {printable(first, 80)} {what}{rest}"


class OtherBaseError(ValueError):
    """A base that is not the one the adapter was trained on.

    Attributes:
        problem: the message without the way out.
        way_out: whether `allow_other_base` helps.
    """

    def __init__(self, problem: str, way_out: bool = False) -> None:
        take_it = (
            " To take it all the same: allow_other_base=True in PeftModel.from_pretrained or "
            "SingleLayerConfig.from_pretrained, or --allow-other-base."
        )
        super().__init__(f"{problem}{take_it if way_out else ''}")
        self.problem, self.way_out = problem, way_out


def other_base(
    problem: str, recorded: Mapping[str, Any], found: Mapping[str, Any] | None = None, way_out: bool = True
) -> OtherBaseError:
    """The error for a base that is not the one the adapter was trained on; names all that is known to differ.

    Args:
        problem: what differs, as `what_differs` says it.
        recorded: what is known of the recorded base, as `describe_base` says it.
        found: the same of the base at hand.
        way_out: whether `allow_other_base` helps.
    """
    made = " at ".join(printable(recorded[field]) for field in ("name", "revision") if recorded.get(field))
    differ = [
        f"{what} {printable(recorded[field], limit)} there and {printable(found[field], limit)} here"
        for field, what, limit in (("name", "name", 200), ("revision", "commit", 40), ("config", "configuration", 12))
        if found and recorded.get(field) and found.get(field) and recorded[field] != found[field]
    ]
    return OtherBaseError(
        f"this is not the base that the adapter was trained on ({made or 'unnamed'}): {problem}"
        f"{'; ' + ', '.join(differ) if differ else ''}.",
        way_out,
    )


def name_stages(stages: Iterable[Stage]) -> str:
    """What was merged before, in words: "block 1 of org/base"."""
    said = [f"{name_blocks(stage.blocks)} of {printable(stage.base or 'an unnamed model', 60)}" for stage in stages]
    return ", then ".join(said[:3]) + (" ..." if len(said) > 3 else "")


def not_compared(comparison: Comparison) -> str:
    """What to warn of if some tensors could not be compared; "" if all were."""
    if not comparison.unchecked:
        return ""
    return (
        f"{len(comparison.unchecked)} tensor(s) could not be compared with the base that the adapter was trained on: "
        f"{in_words(comparison.unchecked)}."
    )


def _kinds(dtype: str) -> list[str]:
    if dtype == QUANTIZED:
        return []
    narrower = ["float32", *NARROW] if dtype == "float64" else NARROW
    return [dtype, *(kind for kind in narrower if kind != dtype)]
