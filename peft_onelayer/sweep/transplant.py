"""A transplant profile: what the blocks of a fully trained model do in its base, without any training.

After one full-parameter run, blocks of its model take the places of the base's: each alone, neighbours together, and
all from below or from above. One evaluation each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.records.files import CONFIG
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate
from peft_onelayer.rollouts.prompts import check_prompt, shaped
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs.as_run import as_in_run, run_in
from peft_onelayer.runs.models import load_causal_lm, to_device, without_progress_bars
from peft_onelayer.runs.progress import Progress
from peft_onelayer.runs.settings import EvaluationSettings
from peft_onelayer.tasks import Task, load_task
from peft_onelayer.tuner import find_decoder_stack

from .early import check_problems
from .metric import gain, layer_contribution

KINDS = ("single", "window", "below", "above")
WINDOW = 3  # neighbours that are put in together


@dataclass(frozen=True)
class Transplant:
    """Blocks that are put in together.

    Attributes:
        kind: "single", "window", "below" (all up to a block) or "above" (all from a block on).
        blocks: ascending.
    """

    kind: str
    blocks: tuple[int, ...]


def transplants(num_layers: int, kinds: Iterable[str] = KINDS, window: int = WINDOW) -> list[Transplant]:
    """All transplants of these kinds; all blocks together are the last of "below".

    >>> [t.blocks for t in transplants(4, ["window", "above"])]
    [(0, 1, 2), (1, 2, 3), (1, 2, 3), (2, 3), (3,)]
    """
    ranges = {
        "single": [range(k, k + 1) for k in range(num_layers)],
        "window": [range(k, k + window) for k in range(num_layers - window + 1)],
        "below": [range(k + 1) for k in range(num_layers)],
        "above": [range(k, num_layers) for k in range(1, num_layers)],
    }
    return [Transplant(kind, tuple(blocks)) for kind in kinds for blocks in ranges[kind]]


@contextmanager
def transplanted(base: PreTrainedModel, donor: PreTrainedModel, blocks: Sequence[int]) -> Iterator[PreTrainedModel]:
    """`base` with these blocks of `donor`, in its own dtype; afterwards bit for bit as before."""
    pairs = [pair for k in blocks for pair in _pairs(base, donor, k)]
    kept = [here.detach().clone() for here, _ in pairs]
    try:
        with torch.no_grad():
            for here, there in pairs:
                here.copy_(there)
        yield base
    finally:
        with torch.no_grad():
            for (here, _), before in zip(pairs, kept, strict=True):
                here.copy_(before)


def check_donor(base: PreTrainedModel, donor: PreTrainedModel) -> None:
    """Raise ValueError unless the two models have the same blocks."""
    depths = [len(find_decoder_stack(model).blocks) for model in (base, donor)]
    if depths[0] != depths[1]:
        raise ValueError(f"the base has {depths[0]} blocks and the trained model {depths[1]}: they are no pair")
    for k in range(depths[0]):
        for here, there in _pairs(base, donor, k):
            if here.shape != there.shape:
                shapes = f"{tuple(here.shape)} in the base and {tuple(there.shape)} in the trained model"
                raise ValueError(f"a tensor of block {k} has shape {shapes}: they are no pair")


def _pairs(
    base: PreTrainedModel, donor: PreTrainedModel, k: int
) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    here, there = (dict(find_decoder_stack(model).blocks[k].named_parameters()) for model in (base, donor))
    if here.keys() != there.keys():
        name = min(here.keys() ^ there.keys())
        raise ValueError(f"only one of the two models has {name} in block {k}: they are no pair")
    return [(here[name], there[name]) for name in sorted(here)]


def evaluate_transplants(
    base: PreTrainedModel,
    donor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    asked: Sequence[Transplant],
    rows: Sequence[dict[str, Any]],
    sampling: Sampling,
) -> Iterator[tuple[Transplant, Evaluation]]:
    """The base with each transplant, on `rows`, as it is measured.

    Raises:
        ValueError: models with other blocks.
    """
    check_donor(base, donor)
    for transplant in asked:
        with transplanted(base, donor, transplant.blocks):
            found = evaluate(base, tokenizer, task, rows, sampling)
        yield transplant, found


@dataclass(frozen=True)
class TransplantProfile:
    """What each block of a fully trained model gains in the base, put in alone. Lists have one entry for each block.

    Nothing is trained, so a share is no layer contribution.

    Attributes:
        base: name or path of the model before training.
        full: of the model after it.
        task: that was evaluated.
        problems: number evaluated on.
        samples: completions of each problem.
        chat: whether prompts are messages of a user.
        system: text of the system message, or ahead of a plain prompt; None for none.
        shots: problems that every prompt shows with their solutions; None for none.
        sampling: how completions are sampled, by field of `Sampling`.
        base_score: of the base.
        full_score: of the fully trained model.
        full_gain: the difference and its standard error.
        gains: in mean score over the base.
        errors: standard errors of the gains.
        shares: gains over the full run's gain; None where that is noise.
        share_errors: standard errors of the shares, None likewise.
        undefined: why there are no shares; None where there are.
        tokens_generated: by all evaluations.
    """

    base: str
    full: str
    task: str
    problems: int
    samples: int
    chat: bool
    system: str | None
    shots: int | None
    sampling: dict[str, Any]
    base_score: float
    full_score: float
    full_gain: tuple[float, float | None]
    gains: list[float]
    errors: list[float | None]
    shares: list[float | None]
    share_errors: list[float | None]
    undefined: str | None
    tokens_generated: int

    @property
    def order(self) -> list[int]:
        """The blocks, the largest gain first."""
        return sorted(range(len(self.gains)), key=lambda k: -self.gains[k])

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `onelayer analyze --transplant --json` prints."""
        return {"format": "onelayer-transplant-1", **asdict(self)}


def transplant_profile(
    base: str,
    full: str,
    task: str,
    *,
    problems: int = 256,
    samples: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    chat: bool | None = None,
    system: str | None = None,
    shots: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> TransplantProfile:
    """Put each block of a fully trained model into its base, alone, and evaluate.

    Prompts are given and completions sampled as by the run that trained the model, by the run.json beside it, unless
    the arguments say otherwise; without a run.json as by default.

    Args:
        base: the model before training: a folder or a Hub id.
        full: the whole model after training all parameters, likewise.
        task: a name for `load_task`.
        problems: of the test split, at least two; fewer than asked for where it is smaller.
        samples: completions of each problem.
        seed: of the problems and of sampling.
        chat, system, shots: as of `EvaluationSettings`; None for the run's.
        sampling: values by field of `Sampling`, over those of the run.
        revision: Hub revision of the base.
        progress: is told what goes on.

    Raises:
        ValueError: in one line: no such model or task, an adapter in place of a model, models with other blocks,
            fewer than two problems, or prompts that cannot be.
    """
    if (Path(full).expanduser() / CONFIG).is_file():
        raise ValueError(f"{full} is an adapter; a transplant needs the whole model that training all parameters left")
    progress = progress or Progress()
    asked = load_task(task)
    check_problems(problems, asked)
    settings = EvaluationSettings(
        model=full,
        chat=chat,
        system=system,
        shots=shots,
        sampling=sampling or {},
        samples=samples,
        batch_size=batch_size,
        seed=seed,
    )
    shape, how = as_in_run(run_in(Path(full).expanduser()), asked, settings, progress)
    with without_progress_bars():
        model, tokenizer = load_causal_lm(base, revision)
        donor, _ = load_causal_lm(full)
        check_donor(model, donor)
        for loaded in (model, donor):
            to_device(loaded)
        asked, chat = shaped(asked, tokenizer, shape)
        rows = asked.rows("test", problems, seed)
        check_prompt(rows[0], tokenizer, base, settings.sampling.get("chat_template_kwargs"))
        singles = transplants(len(find_decoder_stack(model).blocks), ["single"])
        found: list[Evaluation] = []
        with progress.bar("evaluating blocks", len(singles) + 2) as update:
            for one in itertools.chain(
                (evaluate(whole, tokenizer, asked, rows, how) for whole in (model, donor)),
                (e for _, e in evaluate_transplants(model, donor, tokenizer, asked, singles, rows, how)),
            ):
                found.append(one)
                update(len(found), "")
    before, after, *alone = found
    gains = [gain(one.scores, before.scores) for one in alone]
    shares = [layer_contribution(one.scores, before.scores, after.scores) for one in alone]
    return TransplantProfile(
        base=base,
        full=full,
        task=task,
        problems=before.n,
        samples=samples,
        chat=chat,
        system=shape.system or None,
        shots=shape.shots or None,
        sampling=how.shape,
        base_score=before.mean,
        full_score=after.mean,
        full_gain=gain(after.scores, before.scores),
        gains=[value for value, _ in gains],
        errors=[error for _, error in gains],
        shares=[share.value for share in shares],
        share_errors=[share.standard_error for share in shares],
        undefined=next((share.reason for share in shares), None),
        tokens_generated=sum(one.tokens_generated for one in found),
    )
