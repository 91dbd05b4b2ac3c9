"""`onelayer vote`: several adapters of one base vote on answers, beside as many samples of one of them.

--json prints an object of the format "onelayer-vote-1": the fields of `VoteRecord`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ._errors import user_error
from ._figures import score
from ._options import (
    AllowOtherBase,
    Chat,
    Dataset,
    Json,
    Revision,
    Reward,
    Sampling,
    Seed,
    Shots,
    System,
    TaskName,
    TrustRemoteCode,
    Unsafe,
)
from ._output import TerminalProgress, command_line, print_line, print_table, status


def vote(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Two or more of one base.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base model: a folder or a Hub id. [default: of the first adapter]", show_default=False),
    ] = None,
    task: TaskName = None,
    dataset: Dataset = None,
    reward: Reward = None,
    split: Annotated[str, typer.Option(help="Problems of which split: test or train.")] = "test",
    problems: Annotated[int, typer.Option(min=1, help="Number of problems; fewer where the split is smaller.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each problem by each adapter.")] = 1,
    against: Annotated[
        int, typer.Option(min=0, help="Which adapter is given as many samples alone, counted from 0.")
    ] = 0,
    sampling: Sampling = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at a time.")] = 64,
    seed: Seed = 0,
    chat: Chat = None,
    system: System = None,
    shots: Shots = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.", show_default=False)] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_other_base: AllowOtherBase = False,
    unsafe: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Let adapters vote on the answers to a task's problems, with one base model in memory."""
    from peft_onelayer.records.figures import Measured, about_watched
    from peft_onelayer.rl.sampling import OWN_OPTIONS, sampling_from_text
    from peft_onelayer.runs.early import check_vote
    from peft_onelayer.runs.settings import VoteSettings

    with user_error(ValueError, OSError, ImportError):
        asked = VoteSettings(
            model=base or "",
            adapters=adapters,
            against=against,
            task=task,
            dataset=dataset,
            reward=reward,
            split=split,
            problems=problems,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            chat=chat,
            system=system,
            shots=shots,
            out=out,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
            unsafe=unsafe,
        )
        check_vote(asked)
        given = sampling_from_text(sampling or [], OWN_OPTIONS)
        with status("loading ..."):
            from peft_onelayer.runs.voting import vote as take_vote
        found = take_vote(
            replace(asked, sampling=given),
            command=command_line(),
            progress=TerminalProgress(),
        )
    if as_json:
        print(found.to_json(), end="")
        return
    k, n = found.samples, len(found.adapters)
    print_table(
        f"{found.task.name}: {found.n} problems, {k} completions of each",
        ["", "majority", f"avg@{k}", f"pass@{k}"],
        [
            [name, score(ballot.vote), score(ballot.average), score(ballot.best)]
            for name, ballot in ((f"{n} adapters", found.of_adapters), (found.against, found.of_one))
        ],
    )
    for name, figures in zip(found.adapters, found.averages, strict=True):
        print_line(f"{name}: {score(figures)} on average")
    print_line(f"vote of the adapters minus vote of the one: {score(found.difference, '+')}, paired by problem")
    votes = found.of_one.vote, found.of_adapters.vote, found.difference
    if said := about_watched({"vote": Measured(found.n, k, *votes, found.watched, found.unwatched)}):
        print_line(said)
    print_line(f"the lowest {found.shared_blocks} blocks ran once for all adapters")
