"""eval.json: how good a model is on a task and, with an adapter, how much better than its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from .fields import Record
from .figures import Measured
from .run import BaseModel, DataSource
from .text import printable


@dataclass(frozen=True)
class MeasuredAdapter:
    """The adapter that was measured.

    Attributes:
        name: as given: a folder or a Hub id.
        peft_type: such as "SINGLE_LAYER".
        layers: the trained blocks; None for other types.
        sha256: of adapter_model.safetensors.
    """

    name: str
    peft_type: str | None
    layers: list[int] | None
    sha256: str


@dataclass(frozen=True)
class Example:
    """A problem with one completion of each model, to be read.

    Attributes:
        decoding: "sampled" or "greedy".
        prompt: the problem; of a chat, its last message.
        base: what the base wrote.
        base_reward: what that was worth.
        adapter: what the adapter wrote; None without one.
        adapter_reward: what that was worth.
    """

    decoding: str
    prompt: str
    base: str
    base_reward: float
    adapter: str | None = None
    adapter_reward: float | None = None


@dataclass(frozen=True)
class EvaluationRecord(Record):
    """eval.json.

    Attributes:
        command: the command line; None for an evaluation from Python.
        model: the base.
        adapter: None where the base alone was measured.
        task: prompts and reward.
        split: of the problems.
        n: number of problems.
        samples: completions of each at `temperature`; 0 for greedy decoding alone.
        temperature: of sampling.
        max_completion_tokens: where a completion is cut.
        seed: of the problems and of sampling.
        results: by decoding mode, "sampled" or "greedy".
        batch_size: completions generated at a time, on which the samples depend.
        chat: whether prompts were given as messages of a user.
        sampling: all that shapes a completion, by field of `Sampling`; greedy decoding takes what of it applies.
        machine: versions and hardware.
        seconds: of the whole evaluation.
        scores: of every problem, by model ("base", "adapter") and decoding mode.
        problems: the rows.
        also: results on other tasks, by their names; None where none was asked for.
        examples: the first problems with a completion of each model.
    """

    FORMAT: ClassVar[str] = "onelayer-eval-1"
    WHAT: ClassVar[str] = "an evaluation"

    command: str | None
    model: BaseModel
    adapter: MeasuredAdapter | None
    task: DataSource
    split: str
    n: int
    samples: int
    temperature: float
    max_completion_tokens: int
    seed: int
    results: dict[str, Measured]
    batch_size: int | None = None
    chat: bool | None = None
    sampling: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    seconds: float | None = None
    scores: dict[str, dict[str, list[float]]] | None = None
    problems: list[dict[str, Any]] | None = None
    also: dict[str, dict[str, Measured]] | None = None
    examples: list[Example] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str) -> Self:
        """As `Record.from_dict`; figures of an unknown decoding mode, or missing ones, are refused too."""
        record = super().from_dict(fields, where)
        if not record.results or not record.results.keys() <= {"sampled", "greedy"}:
            found = ", ".join(printable(mode, 40) for mode in record.results)
            raise ValueError(f'{where}: results holds {found or "nothing"}, expected "sampled", "greedy" or both')
        places = {f"results.{mode}": result for mode, result in record.results.items()}
        for task, results in (record.also or {}).items():
            places |= {f"also.{printable(task, 60)}.{printable(mode, 40)}": result for mode, result in results.items()}
        for place, result in places.items():
            for name in ("adapter", "difference"):
                if (getattr(result, name) is None) != (record.adapter is None):
                    stands = "is missing" if record.adapter else "is there without an adapter"
                    raise ValueError(f"{where}: {place}.{name} {stands}")
        return record
