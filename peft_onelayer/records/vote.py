"""What a vote of several adapters measured, as `onelayer vote --json` prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .fields import Record
from .figures import Figures
from .run import BaseModel, DataSource


@dataclass(frozen=True)
class Ballot:
    """So many completions of each problem, and what they come to.

    Attributes:
        vote: reward of the answer that most completions give; of equally many the one that was given first. A
            completion without an answer has no vote.
        average: avg@k, the mean reward of all.
        best: pass@k, the largest reward of all.
    """

    vote: Figures
    average: Figures
    best: Figures


@dataclass(frozen=True)
class VoteRecord(Record):
    """A vote of adapters beside as many samples of one of them.

    Attributes:
        command: that was typed; None from Python.
        model: the base.
        adapters: that voted.
        against: the one of them that was given as many samples alone.
        task: the problems' source.
        split: of the problems.
        n: number of problems.
        samples: completions of a problem, k: of all adapters together, and of the one.
        seed: of data and sampling.
        of_adapters: the adapters together.
        of_one: the one adapter.
        averages: avg of each adapter's own completions.
        difference: the adapters' vote minus the one's, paired by problem.
        shared_blocks: the blocks below the lowest trained one, which ran once for all adapters.
        watched: problems by which the run of an adapter chose the step whose state it put out; None where none are.
        unwatched: `difference` without these problems; None where none are watched, or all.
    """

    FORMAT: ClassVar[str] = "onelayer-vote-1"
    WHAT: ClassVar[str] = "a vote"

    model: BaseModel
    adapters: list[str]
    against: str
    task: DataSource
    split: str
    n: int
    samples: int
    seed: int
    of_adapters: Ballot
    of_one: Ballot
    averages: list[Figures]
    difference: Figures
    shared_blocks: int
    command: str | None = None
    watched: int | None = None
    unwatched: Figures | None = None
