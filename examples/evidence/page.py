"""Writes docs/evidence.md and its drawings from the rows in results/: every figure is computed, none typed in.

    python examples/evidence/page.py

What stands between the two marks of "What went wrong" is written by hand, and is kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from figures import BLOCKS, SEARCH, Study, name_of, ranges, studies
from planned import RESULTS, SEEDS
from sections import drawing, section, transplants
from words import contribution, points, seeds_of, where

from peft_onelayer.statistics import Z_95
from peft_onelayer.sweep.metric import LayerContribution

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- by hand begins -->", "<!-- by hand ends -->"
CEILING = 0.95  # a score of full training above which C says who can do the task, and not how well
OTHERS = ("lora-all", "lora-all-sized", "mask", "norms")


def pages(results: Path = RESULTS, page: Path = PAGE) -> dict[Path, str]:
    """What every file that this script writes holds, by its path.

    Args:
        page: as it stands: its part that is written by hand is kept.
    """
    found = studies(results)
    texts = {results / f"{study.setting.name}.svg": drawn for study in found if (drawn := drawing(study)) is not None}
    return {page: page_text(found, results, by_hand(page)), **texts}


def by_hand(page: Path) -> str:
    """What stands between the marks; nothing where there is no page yet."""
    text = page.read_text(encoding="utf-8") if page.exists() else BEGIN + "\n" + END
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip("\n")


def page_text(found: Sequence[Study], results: Path, kept: str) -> str:
    parts = [
        "# Does one block match full training?",
        "Written by `python examples/evidence/page.py` from [the rows](../examples/evidence/results); changes by hand "
        "are lost, but for one part. The models are [4-bit files, dequantized to bfloat16]"
        "(models.md#the-pretrained-models-that-were-measured), not the checkpoints on the Hub.",
        "## The answer",
        " ".join(answer(found)),
        "## What is there, and what is missing",
        *inventory(found),
    ]
    for study in found:
        if study.rows:
            parts += section(study)
    parts += transplants(found, results)
    parts += ["## Settings", *settings(found)]
    parts += ["## What went wrong", f"{BEGIN}\n{kept}\n{END}", "## What would change the conclusion", *doubts(found)]
    parts += ["## The same on Qwen3-1.7B", *qwen()]
    return "\n\n".join(part for part in parts if part) + "\n"


# The answer


def answer(found: Sequence[Study]) -> list[str]:
    """At most five sentences: three of the first study that has a C of the middle block, what the others say, and what
    is missing."""
    told = [study for study in found if _middle(study) is not None]
    sentences = []
    if told:
        sentences += _told(told[0])
        if others := [s for study in told[1:] for s in [_short(study)] if s]:
            sentences.append("Elsewhere: " + "; ".join(others) + ".")
    else:
        there = [f"{sum(p.there for p in s.parts())} of {sum(p.wanted for p in s.parts())} ({where(s)})" for s in found]
        sentences.append("No contribution of a block can be given yet: of the runs there are " + ", ".join(there) + ".")
    lacking = [f"{where(study)}: {missing}" for study in found if (missing := _missing(study))]
    if lacking:
        sentences.append("Not measured yet, by name below: " + "; ".join(lacking) + ".")
    assert len(sentences) <= 5
    return sentences


def _told(study: Study) -> list[str]:
    c, equal = _middle(study), study.contribution(study.of("block", study.middle), study.full_at_equal)
    assert c is not None and c.value is not None
    full, error = study.gain(study.full)
    seeds = seeds_of([*study.of("block", study.middle), *study.full])
    said = [
        f"On {where(study)}, training all parameters gains {points(full, error)}, and training the middle block "
        f"alone, {study.middle} of {study.depth}, chosen before any run, has C = {contribution(c)} with both rates "
        f"tuned and {contribution(equal)} at equal rates ({seeds}): {_against(study, c)}."
    ]
    blocks = study.blocks()
    if crossed := study.crossed():
        best = ", ".join(f"block {k} of seed {seed} has C = {contribution(c)}" for seed, k, c in crossed)
        tied = study.tied()
        alike = f"of {len(blocks)} blocks, {len(tied)} are not told apart from the best ({ranges(tied)})"
        said.append(f"The best block of one seed, measured in the others: {best}; {alike}.")
    elif len(blocks) > 1:
        mean = {k: statistics.fmean(row["mean"] for row in rows) for k, rows in blocks.items()}
        best_one = max(mean, key=mean.__getitem__)
        of_best = study.contribution(blocks[best_one], study.full)
        worst = min(mean, key=mean.__getitem__)
        of_worst = study.contribution(blocks[worst], study.full)
        said.append(
            f"Of the {len(blocks)} of {study.depth} blocks that were measured, {best_one} has the highest C, "
            f"{contribution(of_best)}, chosen and measured by the same runs, which flatters it, and {worst} the "
            f"lowest, {contribution(of_worst)}."
        )
    compared = [
        f"{name_of(kind)} {contribution(c)}" for kind in OTHERS if (c := study.contribution(study.of(kind), study.full))
    ]
    if compared:
        said.append(f"Beside it, as shares of the same gain: {', '.join(compared)}.")
    return said


def _short(study: Study) -> str:
    if (c := _middle(study)) is None:
        return ""
    seeds = seeds_of([*study.of("block", study.middle), *study.full])
    return f"on {where(study)} the middle block has C = {contribution(c)} ({seeds}): {_against(study, c)}"


def _middle(study: Study) -> LayerContribution | None:
    """C of the middle block with both rates tuned; None where it is undefined, or a run is missing."""
    c = study.contribution(study.of("block", study.middle), study.full)
    return c if c is not None and c.value is not None else None


def _missing(study: Study) -> str:
    """The parts of a study that are not whole, in few words."""
    if not study.rows:
        return "everything"
    names = [part.name for part in study.parts() if part.there < part.wanted]
    rates = [name.removeprefix(SEARCH) for name in names if name.startswith(SEARCH)]
    listed = [f"the search for the rate{'s' * (len(rates) > 1)} of {', '.join(rates)}"] if rates else []
    others = []
    for part in study.parts():
        if part.there < part.wanted and part.name.startswith(BLOCKS):
            listed.append(f"{part.name} ({part.missing})")
        elif part.there < part.wanted and not part.name.startswith(SEARCH):
            others.append(part.name)
    return ", ".join([*listed, *(others if len(others) < 5 else [f"{len(others)} other parts"])])


def _against(study: Study, c: LayerContribution) -> str:
    """The verdict on C; none where full training has hardly room left to do better."""
    assert c.value is not None
    reached = statistics.fmean(row["mean"] for row in study.full)
    if reached > CEILING:
        return f"at the ceiling (full training scores {reached:.3f})"
    half = Z_95 * (c.standard_error or 0.0)
    if abs(c.value - 1) <= half:
        return "not told apart from full training"
    return "more than full training" if c.value > 1 else "less than full training"


# What is there


def inventory(found: Sequence[Study]) -> Iterator[str]:
    for study in found:
        parts = study.parts()
        if not study.rows:
            yield f"**{where(study)}**: nothing was measured; missing are all {sum(p.wanted for p in parts)} runs."
            continue
        whole = all(part.there == part.wanted for part in parts)
        yield f"**{where(study)}**: " + ("complete." if whole else "incomplete.")
        lines = ["| part | there | missing |", "|---|---|---|"]
        lines += [f"| {part.name} | {part.there} of {part.wanted} | {part.missing} |" for part in parts]
        yield "\n".join(lines)


# The rest


def settings(found: Sequence[Study]) -> Iterator[str]:
    yield (
        "[Frozen before the first run](../examples/evidence/README.md#frozen-before-the-first-run), the tasks "
        "([sums](../examples/evidence/sums.py), [the repeated word](../examples/evidence/repeated.py)) among them. ± "
        "is one standard error and [ ] a 95 % interval: over problems, paired with the base, and over seeds where "
        "there are several; of two seeds the spread is hardly known."
    )
    for study in found:
        s = study.setting
        yield (
            f"{where(study)}: {s.steps} steps of {s.prompts} prompts x {s.completions} completions, GRPO; "
            f"{s.problems} problems of the test split x {s.samples} samples at temperature 1; rates chosen on "
            f"{s.search_problems} of the train split x {s.samples}."
        )
    machines: dict[str, int] = {}
    for study in found:
        for row in [*study.rows, *study.probes, *study.kept]:
            v = row["versions"]
            names = ("peft", "trl", "transformers", "torch")
            said = f"{v['machine']}, {v['device']}, " + ", ".join(f"{n} {v['versions'][n]}" for n in names)
            machines[said] = machines.get(said, 0) + 1
    if machines:
        yield "Rows by machine: " + "; ".join(f"{count} on {said}" for said, count in sorted(machines.items())) + "."
    seconds = sum(row["cpu_seconds"] for study in found for row in [*study.rows, *study.probes, *study.kept])
    yield f"All rows took {seconds / 3600:.1f} hours of CPU time."
    yield "One row again, which says whether it comes out within the row's interval and writes nothing:"
    yield ("```\npython examples/evidence/evidence.py smollm2-135m sums --repeat 'block 15, rate 1e-4, seed 0'\n```")


def doubts(found: Sequence[Study]) -> Iterator[str]:
    yield (
        "- **The size.** Models of 135 and 500 million parameters on tasks with answers of a few tokens say little "
        "about larger ones that reason at length."
    )
    yield (
        "- **The length.** "
        + " and ".join(sorted({f"{study.setting.steps} steps" for study in found}))
        + " are short; where full training has not ended, C compares speeds."
    )
    yield (
        "- **The rates.** All blocks have the rate of the middle one, and each kind was tuned over as many rates, "
        "three times apart. A best rate at an end of the grid is marked in the tables: beyond it may be a better one."
    )
    for study in found:
        if study.full and study.of("base"):
            value, error = study.gain(study.full)
            if error:
                said = f"Full training's gain is {value / error:.1f} standard errors"
                yield f"- **The ruler on {where(study)}.** {said}; C is as good as this is large."
    yield (
        "- **The seeds.** "
        + f"{len(SEEDS)} seeds at most; an interval over two hardly knows their spread. A third seed "
        "that moves the middle block's C across 1 changes the answer."
    )


def qwen() -> list[str]:
    return [
        "[Two recipes](runs.md#recipes-and-files) have the settings of the paper and those of the scripts. Nothing of "
        "them was run here. `my_task.py` gives the data and the reward ([tasks](tasks.md)). One block, and all "
        "parameters at the recipe's own rate for them:",
        "```\n"
        "onelayer train --recipe qwen3-1.7b-numina:paper --task my_task.py --layer 14 --out paper-14\n"
        "onelayer train --recipe qwen3-1.7b-numina:paper --task my_task.py --full --out paper-full\n"
        "onelayer train --recipe qwen3-1.7b-numina:scripts --task my_task.py --layer 14 --out scripts-14\n"
        "onelayer train --recipe qwen3-1.7b-numina:scripts --task my_task.py --full --out scripts-full\n"
        "onelayer eval Qwen/Qwen3-1.7B-Base --adapter paper-14 --task my_task.py --recipe qwen3-1.7b-numina:paper\n"
        "```",
        "Every block, with C under three regimes of rates ([sweeps](sweeps.md)):",
        "```\n"
        "onelayer sweep Qwen/Qwen3-1.7B-Base --task my_task.py --seeds 0,1 --learning-rate 5e-6 "
        "--search-learning-rates 1e-6,5e-6,2e-5 --regimes --out sweep\n"
        "```",
    ]


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
