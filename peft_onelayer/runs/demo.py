"""The whole job on the embedded model: rank the blocks, train one with GRPO, measure, save, and reload bit for bit."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from peft import PeftModel, get_peft_model_state_dict

from peft_onelayer.adapter.reload import fingerprint, fingerprint_in_fresh_process
from peft_onelayer.hub.card import PLOT, REWARDS, model_card
from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.fields import Record
from peft_onelayer.records.files import (
    CARD,
    CONFIG,
    EVALUATION,
    PROFILE,
    RUN,
    WEIGHTS,
    check_folder,
    read_fields,
    read_text,
    staged_directory,
    write_whole,
)
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.text import name_blocks
from peft_onelayer.report.plots import plot_ranking, plot_rewards
from peft_onelayer.rl.recipe import demo_config
from peft_onelayer.tasks import load_task

from .early import DEMO, check_demo
from .evaluation import evaluate
from .log import LOG
from .progress import Progress
from .recipes import RUN_YAML
from .settings import STEPS, EvaluationSettings, TrainingSettings
from .training import Run, train

ADAPTER = "adapter"
FILES = {ADAPTER, DEMO, "ranking.png", "reward.png"}
ADAPTER_FILES = {CONFIG, WEIGHTS, CARD, PROFILE, RUN, EVALUATION, RUN_YAML, LOG, PLOT, REWARDS}
PROBLEMS, SAMPLES = 1024, 4
PACKAGES = ("peft-onelayer", "peft", "trl", "transformers", "torch")


@dataclass(frozen=True)
class DemoRecord(Record):
    """demo.json: what the demo did and what came of it.

    Attributes:
        results: by decoding mode, mean accuracy of "base" and "adapter", their "difference" and its "standard_error".
        trained_parameters: of the adapter.
        reload_bit_equal: whether a fresh process that loaded the adapter had the same weights and logits, bit by bit.
        sha256: of the adapter's tensors.
        probe_cost: of the ranking; None where the block was chosen by the user.
        verdict: a sentence.
    """

    FORMAT: ClassVar[str] = "onelayer-demo-1"
    WHAT: ClassVar[str] = "a demo"

    task: str
    model: str
    num_layers: int
    layers: list[int]
    why: str
    problems: int
    samples: int
    results: dict[str, dict[str, float]]
    parameters: int
    trained_parameters: int
    adapter_bytes: int
    reload_bit_equal: bool
    sha256: str
    steps: int
    learning_rate: float
    seed: int
    rewards: list[float]
    probe_cost: dict[str, float] | None
    versions: dict[str, str]
    command: str | None
    verdict: str
    seconds: float


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    task: str = "arithmetic",
    layer: str = "auto",
    steps: int = STEPS,
    model: str | None = None,
    trust_remote_code: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> DemoRecord:
    """Do the whole job and write adapter, figures and plots to the folder `out`.

    Args:
        out: a new or empty folder, or that of an earlier demo.
        task: one of `DEMO_TASKS`.
        layer: blocks to train, or "auto" to rank them first.
        steps: of GRPO, each of 24 prompts x 8 completions.
        model: another base model for the task: a folder or a Hub id.
        trust_remote_code: run the Python code that comes with that model.
        command: for the records.
        progress: is told what goes on.

    Raises:
        ValueError: in one line: as `train` and `evaluate`; an unknown task; a reloaded adapter that differs.
    """
    start, progress = time.perf_counter(), progress or Progress()
    check_demo(out, task, layer, model)
    check_folder(out, is_demo)
    base = str(files("peft_onelayer") / "demo_model") if model is None else model
    with staged_directory(out, is_demo) as folder:
        settings = TrainingSettings(
            model=base,
            out=folder / ADAPTER,
            task=task,
            layer=layer,
            steps=steps,
            config={**demo_config(steps), "save_strategy": "no"},
            seed=seed,
            chat=False,
            trust_remote_code=trust_remote_code,
        )
        run = train(settings, command=command, progress=progress, keeps=False)
        evaluation = _evaluate(settings, command, progress)
        record = _record(run, evaluation, task, progress)
        _write_plots(run, record, folder)
        _write_records(run, evaluation, record.verdict, record.trained_parameters)
        record = replace(record, seconds=round(time.perf_counter() - start, 1))
        write_whole(folder / DEMO, record.to_json())
    return record


def is_demo(folder: Path) -> bool:
    """Whether an earlier demo wrote everything in `folder`, so that nothing is lost by replacing it."""
    try:
        written = read_fields(folder / DEMO).get("format") == DemoRecord.FORMAT
    except ValueError:
        return False
    adapter = folder / ADAPTER
    return (
        written
        and {p.name for p in folder.iterdir()} <= FILES
        and adapter.is_dir()
        and {p.name for p in adapter.iterdir()} <= ADAPTER_FILES
    )


def _evaluate(settings: TrainingSettings, command: str | None, progress: Progress) -> EvaluationRecord:
    row = load_task(str(settings.task)).rows("test", 1, settings.seed)[0]
    progress.note(f"measuring on {PROBLEMS} held-out problems, such as {row['prompt']} -> {row['answer']}")
    evaluation = evaluate(
        EvaluationSettings(
            model=settings.model,
            adapter=str(settings.out),
            task=settings.task,
            problems=PROBLEMS,
            samples=SAMPLES,
            batch_size=PROBLEMS,
            seed=settings.seed,
            chat=settings.chat,
            trust_remote_code=settings.trust_remote_code,
        ),
        command=command,
        progress=progress,
    )
    assert evaluation.adapter is not None
    return replace(evaluation, adapter=replace(evaluation.adapter, name=ADAPTER))  # not the folder it is written in


def _record(run: Run, evaluation: EvaluationRecord, task: str, progress: Progress) -> DemoRecord:
    """Reload the adapter in a fresh process, and put all figures together."""
    record, model = run.record, run.model
    assert record.layers is not None and record.results is not None and isinstance(model, PeftModel)
    rows = load_task(task).rows("test", 16, record.settings.seed)
    token_ids = run.tokenizer([row["prompt"] for row in rows]).input_ids
    progress.note("reloading the adapter in a fresh process ...")
    here = fingerprint(model, token_ids)
    try:
        trust = bool(record.settings.trust_remote_code)
        there = fingerprint_in_fresh_process(run.folder, token_ids, device=run.model.device, trust_remote_code=trust)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if here != there:
        raise ValueError(
            "the adapter reloaded in a fresh process is not bit-equal to the trained one; nothing was kept."
        )
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    results: dict[str, dict[str, float]] = {}
    for mode, measured in evaluation.results.items():
        assert measured.adapter is not None and measured.difference is not None
        spread = measured.difference.standard_error
        results[mode] = {
            "base": measured.base.mean,
            "adapter": measured.adapter.mean,
            "difference": measured.difference.mean,
            "standard_error": 0.0 if spread is None else spread,
        }
    profile = run.folder / PROFILE
    return DemoRecord(
        task=task,
        model=record.settings.model.name,
        num_layers=record.settings.model.num_layers,
        layers=record.layers,
        why=record.why or "",
        problems=evaluation.n,
        samples=evaluation.samples,
        results=results,
        parameters=record.settings.model.parameters,
        trained_parameters=sum(tensor.numel() for tensor in state.values()),
        adapter_bytes=(run.folder / WEIGHTS).stat().st_size,
        reload_bit_equal=True,
        sha256=here["weights"],
        steps=record.results.steps,
        learning_rate=record.settings.config["learning_rate"],
        seed=record.settings.seed,
        rewards=record.results.rewards,
        probe_cost=_ranking(profile).cost if profile.exists() else None,
        versions={package: version(package) for package in PACKAGES},
        command=record.command,
        verdict=_verdict(record.layers, results["sampled"]),
        seconds=0.0,
    )


def _ranking(path: Path) -> LayerRanking:
    return LayerRanking.from_json(read_text(path), str(path))


def _verdict(layers: list[int], sampled: dict[str, float]) -> str:
    """What the sampled accuracy, which GRPO optimises, says; a gain counts beyond three standard errors."""
    difference, error = sampled["difference"], sampled["standard_error"]
    change = f"{100 * difference:+.1f} points of sampled accuracy, standard error {100 * error:.1f}"
    where = name_blocks(layers)
    if difference > 3 * error:
        return f"RL on {where} helped: {change}."
    if difference < -3 * error:
        return f"RL on {where} made the model worse: {change}."
    return f"RL on {where} did not help measurably: {change}, within three standard errors of zero."


def _write_plots(run: Run, record: DemoRecord, folder: Path) -> None:
    if (path := run.folder / PROFILE).exists():
        plot_ranking(_ranking(path), folder / "ranking.png", f"what each block gained in the race, {record.task}")
    title = f"GRPO on {name_blocks(record.layers)} of {record.num_layers}, {record.task}"
    plot_rewards(record.rewards, folder / "reward.png", title)


def _write_records(run: Run, evaluation: EvaluationRecord, verdict: str, trained: int) -> None:
    """Put the evaluation beside the adapter, the verdict into run.json, and both into the card."""
    assert run.record.results is not None
    finished = replace(run.record, results=replace(run.results, verdict=verdict))
    local = bool(finished.settings.model.sha256)
    card = model_card(read_fields(run.folder / CONFIG), finished, evaluation, parameters=trained, local_base=local)
    for name, text in ((RUN, finished.to_json()), (EVALUATION, evaluation.to_json()), (CARD, card)):
        write_whole(run.folder / name, text)
