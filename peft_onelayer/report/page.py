"""One self-contained HTML page about runs, rankings and sweeps: figures, what they mean, and how to repeat them.

It loads nothing. Every drawing has its figures in a table beside it, with the value of the record in `data-value`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.figures import Figures, Measured, about_watched
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import RunRecord
from peft_onelayer.records.text import name_blocks, well_formed

from . import drawing
from .plots import OF_RACE

CURVES = {"reward": "mean reward", "length": "tokens of a completion", "entropy": "entropy", "kl": "KL", "loss": "loss"}


@dataclass(frozen=True)
class Subject:
    """What one section of the page is about; what is not known is None or empty.

    Attributes:
        name: as it was given.
        run: run.json.
        evaluation: eval.json.
        ranking: layer_profile.json, of a probe or a sweep.
        log: lines of log.jsonl.
        bytes: size of the weights.
        beside: other values of the blocks to show beside the ranking, by title, such as the depth prior.
    """

    name: str
    run: RunRecord | None = None
    evaluation: EvaluationRecord | None = None
    ranking: LayerRanking | None = None
    log: Sequence[Mapping[str, float]] = ()
    bytes: int | None = None
    beside: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


def report_page(subjects: Sequence[Subject]) -> str:
    """The page about at least one subject."""
    style = (files("peft_onelayer.report") / "page.css").read_text(encoding="utf-8")
    script = (files("peft_onelayer.report") / "page.js").read_text(encoding="utf-8")
    title = "onelayer: " + ", ".join(subject.name for subject in subjects)
    body = _comparison(subjects) if len(subjects) > 1 else ""
    body += "".join(_section(number, subject) for number, subject in enumerate(subjects))
    return well_formed(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">To the figures</a>\n<header><h1>onelayer report</h1></header>\n'
        f'<main id="main">\n{body}</main>\n<div id="tip" role="status" aria-live="polite" hidden></div>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


Cell = str | int | float | None
ALL_CHANGED = 0.99  # share of a tensor's entries


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], form: str = ".4g") -> str:
    """A table; a number keeps its whole value in `data-value`, and the first cell of a row is its head.

    Args:
        form: of the numbers that are not whole, as `format` takes it.
    """

    def cell(value: Cell, tag: str) -> str:
        if isinstance(value, (int, float)):
            return (
                f'<{tag} data-value="{json.dumps(value)}">{value:,}</{tag}>'
                if isinstance(value, int)
                else (f'<{tag} data-value="{json.dumps(value)}">{value:{form}}</{tag}>')
            )
        scope = ' scope="row"' if tag == "th" else ""
        return f"<{tag}{scope}>{escape(value or '')}</{tag}>"

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = "".join(f"<tr>{cell(row[0], 'th')}{''.join(cell(value, 'td') for value in row[1:])}</tr>\n" for row in rows)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n"
    )


def _figure(heading: str, drawn: str, figures: str) -> str:
    return (
        f"<h3>{escape(heading)}</h3>\n<figure>{drawn}</figure>\n"
        f"<details><summary>The figures</summary>\n{figures}</details>\n"
    )


def _comparison(subjects: Sequence[Subject]) -> str:
    rows: list[list[Cell]] = []
    for subject in subjects:
        measured = _measured(subject)
        run = subject.run
        rows.append(
            [
                subject.name,
                run.settings.algorithm if run else subject.ranking.method if subject.ranking else "",
                _blocks(subject),
                *(_mean(measured, name) for name in ("base", "adapter", "difference")),
                run.results.steps if run and run.results else None,
                run.results.seconds if run and run.results else None,
            ]
        )
    header = ["", "algorithm", "blocks", "base", "trained", "difference", "steps", "seconds"]
    lines = {s.name: [(line["step"], line["reward"]) for line in s.log if "reward" in line] for s in subjects}
    lines = {name: points for name, points in lines.items() if points}
    drawn = f"<figure>{drawing.curves({'mean reward': lines})}</figure>\n" if lines else ""
    shown = table("Side by side", header, rows)
    shown += "".join(_watched(s.name, measured) for s in subjects if (measured := _measured(s)))
    return f"<section>\n<h2>Side by side</h2>\n{shown}{drawn}</section>\n"


def _section(number: int, subject: Subject) -> str:
    run, parts = subject.run, []
    if run and run.results and run.results.verdict:
        gained = " gained" if run.results.verdict.startswith("gained") else ""
        parts.append(f'<p class="verdict{gained}">{escape(run.results.verdict)}.</p>\n')
    parts += [_results(subject), _profile(subject), _curves(subject), _change(subject), _sizes(subject)]
    parts += [_examples(subject), _provenance(subject)]
    heading = f'<h2 id="s{number}">{escape(subject.name)}</h2>\n'
    return f'<section aria-labelledby="s{number}">\n{heading}{"".join(parts)}</section>\n'


def _results(subject: Subject) -> str:
    rows: list[list[Cell]] = []
    for name, measured in _all_measured(subject).items():
        three = {"base": measured.base, "trained": measured.adapter, "difference": measured.difference}
        rows += [
            [f"{name}: {what}", measured.n, figures.mean, figures.standard_error]
            for what, figures in three.items()
            if figures is not None
        ]
    if not rows:
        return ""
    header = ["", "n", "mean reward", "standard error"]
    shown = table("Mean reward, with standard errors", header, rows, ".4f")
    return "<h3>Results</h3>\n" + shown + "".join(_watched(name, one) for name, one in _all_measured(subject).items())


def _watched(name: str, measured: Measured) -> str:
    said = about_watched({name: measured})
    return f"<p>{escape(said)}</p>\n" if said else ""


def _all_measured(subject: Subject) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    if evaluation := subject.evaluation:
        found |= {f"{evaluation.task.name}, {mode}": result for mode, result in evaluation.results.items()}
        for task, results in (evaluation.also or {}).items():
            found |= {f"{task}, {mode}": result for mode, result in results.items()}
    if subject.run and subject.run.results:
        results_of_run = subject.run.results
        if results_of_run.held_out:
            found[f"{subject.run.settings.source.name}, by the run"] = results_of_run.held_out
        found |= {f"{task}, by the run": result for task, result in (results_of_run.also or {}).items()}
    return found


def _measured(subject: Subject) -> Measured | None:
    return next(iter(_all_measured(subject).values()), None)


def _mean(measured: Measured | None, name: str) -> float | None:
    figures: Figures | None = getattr(measured, name) if measured else None
    return figures.mean if figures else None


def _blocks(subject: Subject) -> str:
    if subject.run:
        return "all" if subject.run.layers is None else ", ".join(map(str, subject.run.layers))
    return "" if subject.ranking is None else ", ".join(map(str, subject.ranking.choice))


def _profile(subject: Subject) -> str:
    ranking = subject.ranking
    if ranking is None:
        return ""
    sweep = ranking.sweep
    nothing: list[float | None] = [None] * ranking.num_layers
    chosen = [] if ranking.pick is None else [ranking.pick]
    panels: dict[str, tuple[Sequence[float | None], Sequence[float | None], Sequence[int]]] = {}
    if sweep and not sweep.undefined:
        panels["layer contribution C"] = (sweep.contribution, sweep.contribution_errors or nothing, chosen)
    if ranking.method != "published":
        of_race = f", {OF_RACE}" if ranking.rounds else ""
        panels[f"{'gain' if ranking.measured else 'score'} by {ranking.method}{of_race}"] = (
            ranking.scores,
            ranking.errors,
            chosen,
        )
    panels |= {title: (values, nothing, []) for title, values in subject.beside.items()}
    header, columns = ["block"], []
    for title, (values, errors, _) in panels.items():
        header.append(title)
        columns.append(values)
        if any(errors):
            header.append("standard error")
            columns.append(errors)
    rows: list[list[Cell]] = [
        [f"block {block}", *(values[block] for values in columns)] for block in range(ranking.num_layers)
    ]
    drawn = drawing.bars(panels)
    return _figure(f"Layer profile: {ranking.method} on {ranking.task}", drawn, table("Layer profile", header, rows))


def _curves(subject: Subject) -> str:
    names = [name for name in CURVES if any(name in line for line in subject.log)]
    if not names:
        return ""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {
        CURVES[name]: {CURVES[name]: [(line["step"], line[name]) for line in subject.log if name in line]}
        for name in names
    }
    results = subject.run.results if subject.run else None
    if results and results.evaluations:
        panels["held-out problems"] = {"held-out": [(score.step, score.mean) for score in results.evaluations]}
    rows: list[list[Cell]] = [[f"step {line['step']}", *(line.get(name) for name in names)] for line in subject.log]
    return _figure("Training", drawing.curves(panels), table("Training", ["", *names], rows))


def _change(subject: Subject) -> str:
    movement = subject.run.results.movement if subject.run and subject.run.results else None
    values: dict[tuple[str, str], float] = {}
    relative: dict[tuple[str, str], float] = {}
    rows: list[list[Cell]] = []
    for tensor in movement.tensors if movement else []:
        share = tensor.changed / max(tensor.entries, 1)
        if match := re.search(r"\.(\d+)\.(.+)$", tensor.name):
            values[match[2], match[1]] = share
            relative[match[2], match[1]] = tensor.relative or 0.0
        rows.append([tensor.name, tensor.entries, tensor.changed, share, tensor.norm, tensor.relative])
    if not values:
        return ""
    names = list(dict.fromkeys(name for name, _ in values))
    blocks = sorted({block for _, block in values}, key=int)
    if min(values.values()) > ALL_CHANGED:  # which tells nothing
        drawn = drawing.heat_map(names, blocks, relative, "norm of the change, over that of the base's weights")
    else:
        drawn = drawing.heat_map(names, blocks, values, "share of the entries that changed", 1.0)
    header = ["tensor", "entries", "changed", "share", "norm of the change", "over the base's"]
    return _figure("Where the change sits", drawn, table("Where the change sits", header, rows))


def _sizes(subject: Subject) -> str:
    rows: list[list[Cell]] = []
    run = subject.run
    if run:
        rows.append(["parameters of the model", run.settings.model.parameters])
        if run.results:
            if run.results.movement:
                rows.append(["parameters trained", sum(t.entries for t in run.results.movement.tensors)])
            rows += [["optimizer steps", run.results.steps], ["seconds of training", run.results.seconds]]
            rows += [["tokens generated", run.results.tokens_generated or None]]
            rows += [["tokens trained on", run.results.tokens_trained or None]]
    if subject.bytes is not None:
        rows.append(["bytes of the weights", subject.bytes])
    if subject.ranking and subject.ranking.cost:
        names = {"share": "share of one run"}
        cost = subject.ranking.cost.items()
        rows += [[f"of the ranking: {names.get(name, name.replace('_', ' '))}", value] for name, value in cost]
    rows = [row for row in rows if row[1] is not None]
    return "<h3>Sizes and costs</h3>\n" + table("Sizes and costs", ["", ""], rows) if rows else ""


def _examples(subject: Subject) -> str:
    examples = (subject.evaluation.examples if subject.evaluation else None) or []
    if not examples:
        return ""
    parts = ["<h3>Before and after</h3>\n"]
    for example in examples:
        said = [("base", example.base, example.base_reward)]
        if example.adapter is not None:
            said.append(("trained", example.adapter, example.adapter_reward or 0.0))
        columns = "".join(
            f'<div><h4>{name}, reward <span data-value="{json.dumps(reward)}">{reward:g}</span></h4>'
            f"<pre>{escape(text)}</pre></div>\n"
            for name, text, reward in said
        )
        prompt = f'<pre class="prompt">{escape(example.prompt)}</pre>'
        parts.append(f'<article>\n{prompt}\n<div class="pair">{columns}</div></article>\n')
    return "".join(parts)


def _provenance(subject: Subject) -> str:
    rows: list[list[Cell]] = []
    run, ranking = subject.run, subject.ranking
    if run:
        run = run.cleaned()
        settings = run.settings
        rows += [["base", settings.model.name], ["commit", settings.model.revision], ["dtype", settings.model.dtype]]
        rows += [["blocks", _blocks(subject)], ["why", run.why], ["algorithm", settings.algorithm]]
        rows += [["trainer", settings.trainer]]
        if (rate := settings.config.get("learning_rate")) is not None:
            rows += [["learning rate", _in_words(rate)]]
        rows += [["data", settings.source.name], ["seed", str(settings.seed)]]
        rows += [[name, digest] for name, digest in settings.source.data.items()]
        rows += [[name, _in_words(value)] for name, value in run.machine.items()]
    elif ranking:
        rows += [
            ["base", ranking.model],
            ["commit", ranking.revision],
            ["task", ranking.task],
            ["source", ranking.source],
        ]
        rows += [["choice", name_blocks(ranking.choice)]]
    rows = [row for row in rows if row[1]]
    text = "<h3>Provenance</h3>\n" + table("Provenance", ["", ""], rows)
    if run and run.command:
        text += f"<h3>Repeat it</h3>\n<pre>{escape(run.command)}</pre>\n"
    return text


def _in_words(value: Any) -> str:
    """A value of run.json's `machine`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(inner)}" for name, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value)
