"""`onelayer entropy`: how much of a block's gradient comes from the tokens of high entropy, and where these stand.

--json prints an object of the format "onelayer-entropy-1": the fields of `EntropySignal`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ._errors import user_error
from ._options import (
    AllowOtherBase,
    Chat,
    Dataset,
    Json,
    ModelName,
    Revision,
    Reward,
    Sampling,
    Seed,
    Shots,
    System,
    TaskName,
    TrustRemoteCode,
    Unsafe,
    refuse_given,
)
from ._output import TerminalProgress, print_json, print_line, print_table, status


def entropy(
    context: typer.Context,
    model: ModelName,
    adapter: Annotated[
        str | None,
        typer.Option(help="Measure at this adapter's weights and blocks: a folder or a Hub id.", show_default=False),
    ] = None,
    layer: Annotated[str, typer.Option(help="Without --adapter: the blocks whose gradient is measured.")] = "middle",
    task: TaskName = None,
    dataset: Dataset = None,
    reward: Reward = None,
    share: Annotated[float, typer.Option(help="Of the tokens, those of highest entropy.")] = 0.2,
    problems: Annotated[int, typer.Option(min=1, help="Prompts of the train split.")] = 16,
    samples: Annotated[int, typer.Option(min=2, help="Completions of each prompt.")] = 8,
    sampling: Sampling = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at a time.")] = 64,
    seed: Seed = 0,
    chat: Chat = None,
    system: System = None,
    shots: Shots = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    unsafe: Unsafe = False,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Show which tokens the learning signal of a block comes from: those of high entropy, or the rest."""
    from peft_onelayer.rl.sampling import OWN_OPTIONS, sampling_from_text
    from peft_onelayer.runs.early import check_entropy
    from peft_onelayer.runs.settings import EntropySettings

    with user_error(ValueError, OSError, ImportError):
        if adapter is None:
            refuse_given(context, ("allow_other_base",), "is of --adapter; give that too, or leave it out")
        else:
            why = "is of a measurement without --adapter, which names its blocks; leave it out"
            refuse_given(context, ("layer",), why)
        asked = EntropySettings(
            model=model,
            adapter=adapter,
            layer=layer,
            task=task,
            dataset=dataset,
            reward=reward,
            share=share,
            problems=problems,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            chat=chat,
            system=system,
            shots=shots,
            revision=revision,
            trust_remote_code=trust_remote_code,
            unsafe=unsafe,
            allow_other_base=allow_other_base,
        )
        check_entropy(asked)
        given = sampling_from_text(sampling or [], OWN_OPTIONS)
        with status("loading ..."):
            from peft_onelayer.runs.forking import entropy as measure
        found = measure(
            replace(asked, sampling=given),
            progress=TerminalProgress(),
        )
    if as_json:
        print_json(found.to_json())
        return
    print_table(
        f"{found.completions} completions, gradient of {found.parameters:,} parameters",
        ["tokens", "number", "mean entropy", "gradient norm", "share of the signal"],
        [
            [name, f"{part.tokens:,}", f"{part.entropy:.3f}", f"{part.gradient_norm:.4g}", f"{part.signal:.1%}"]
            for name, part in ((f"top {found.share:.0%} by entropy", found.high), ("the rest", found.rest))
        ],
    )
    cosine = "" if found.cosine is None else f"; cosine between the two gradients {found.cosine:+.3f}"
    print_line(f"norm of the whole gradient {found.gradient_norm:.4g}{cosine}")
    tenths = " ".join("-" if part is None else f"{part:.0%}" for part in found.tenths)
    print_line(f"of high entropy in each tenth of a completion: {tenths}; of first tokens {found.first_tokens:.0%}")
    common = ", ".join(f"{text!r} {count} of {of}" for text, count, of in found.common[:10])
    print_line(f"most often: {common}")
