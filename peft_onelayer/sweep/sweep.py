"""The sweep: every block trained alone, the base and the full model beside them, evaluated on the same problems.

It makes the specifications, hands those without a row to an engine, and keeps each row as it arrives; so a sweep that
was stopped, however, goes on where it was. It does not know how a run is made or where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_onelayer.layers import resolve_layers
from peft_onelayer.records.files import model_digests, write_whole
from peft_onelayer.records.ranking import LayerRanking

from .engines import load_engine
from .profile import make_profile
from .run_layer import Row, RunSpec, run_layer
from .store import RowStore

LEARNING_RATE = 5e-6  # arXiv 2607.01232, Table 8, for one block and for all

OnRow = Callable[[int, int, RunSpec, Row], None]


def sweep_layers(
    model: str,
    task: str,
    *,
    out: str | Path,
    layers: str | int | Sequence[int] = "all",
    algorithm: str = "grpo",
    steps: int = 150,
    seeds: Sequence[int] = (0,),
    learning_rate: float | Mapping[int, float] = LEARNING_RATE,
    full_learning_rate: float | None = None,
    search_learning_rates: Sequence[float] = (),
    settings: Mapping[str, Any] | None = None,
    problems: int = 256,
    samples: int = 4,
    greedy: bool = False,
    batch_size: int = 64,
    evaluation_seed: int = 0,
    chat: bool | None = None,
    revision: str | None = None,
    unsafe: bool = False,
    engine: str = "local",
    workers: int | None = None,
    engine_options: Mapping[str, Any] | None = None,
    run_row: Callable[[RunSpec], Row] = run_layer,
    on_row: OnRow = lambda done, total, spec, row: None,
) -> LayerRanking:
    """Measure the layer contribution of `layers` of `model` on `task`, and write the profile into `out`.

    One run per block and seed, full-parameter runs of the same seeds, and the base, all on the same problems of the
    test split. Rows already in `out/rows` are not run again; run the same call again to go on after a kill.

    Args:
        model: folder, or id on the Hub.
        task: name for `load_task`.
        out: folder for rows/, layer_profile.json and layer_profile.csv; made if it is not there.
        layers: "all", or what `resolve_layers` takes, several of them separated by commas: "0,5,8-11".
        algorithm: name for `load_algorithm`; an online one.
        steps: optimizer steps of every run.
        seeds: of training and its data; the evaluation is the same for all.
        learning_rate: of the blocks' runs; a mapping gives each block its own, such as a probe found.
        full_learning_rate: of the full-parameter runs (default: `learning_rate`, as in the paper; small models need a
            lower one); needed where each block has its own.
        search_learning_rates: rates to choose both from instead: each trains the middle one of `layers`, and all
            parameters, with the first seed; the best on problems of the training split is taken.
        settings: fields of the algorithm's TRL configuration.
        problems: held-out problems, or as many as the split has.
        samples: completions of each problem, at temperature 1.
        greedy: evaluate greedily too.
        batch_size: completions at a time in the evaluation.
        evaluation_seed: of the problems and of sampling.
        chat: give prompts as messages (default: if the tokenizer has a chat template).
        unsafe: let a task that runs the model's code do so without a full sandbox.
        engine: "local", "ray" or "slurm".
        workers: runs at a time (default: the engine's).
        engine_options: arguments of the engine's own.
        run_row: what makes a row.
        on_row: called with (rows done, rows in all, specification, row), also for rows that were there already.

    Raises:
        ValueError: an argument that cannot work, or another sweep is using `out`.
        RunsFailedError: some runs failed; the rows of all others are kept.
        OSError: a row could not be written, such as on a full disk.
    """
    run = load_engine(engine)
    base = _describe(model, revision)
    first = RunSpec(
        model=base.model,
        revision=base.revision,
        model_digests=base.digests,
        task=task,
        task_data=_task_data(task, unsafe),
        layer="full",
        algorithm=_online(algorithm),
        settings=dict(settings or {}),
        steps=_positive("steps", steps),
        seed=0,
        problems=_positive("problems", problems),
        samples=_positive("samples", samples),
        evaluation_seed=evaluation_seed,
        batch_size=batch_size,
        greedy=greedy,
        chat=base.has_chat_template if chat is None else chat,
        unsafe=unsafe,
    )
    chosen = list(range(base.num_layers)) if layers == "all" else resolve_layers(layers, base.num_layers)
    seeds = list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {seeds}")
    out = Path(out)
    store = RowStore(out / "rows")
    of_block = dict(learning_rate) if isinstance(learning_rate, Mapping) else dict.fromkeys(chosen, learning_rate)
    if full_learning_rate is None:
        if isinstance(learning_rate, Mapping):
            raise ValueError("where each block has its own learning rate, full_learning_rate must be given too")
        full_learning_rate = learning_rate
    if missing := [k for k in chosen if k not in of_block]:
        raise ValueError(f"no learning rate for block {missing[0]}; there are rates for {sorted(of_block)}")
    options = dict(engine_options or {})
    early_stop = bool(options.get("early_stop"))
    total = 1 + len(seeds) * (1 + len(chosen)) + 2 * len(search_learning_rates)
    done = 0

    def rows_of(specs: Sequence[RunSpec]) -> list[Row]:
        nonlocal done
        rows: dict[str, Row] = {}
        by_digest = {spec.digest(): spec for spec in specs}

        def keep(digest: str, row: Row) -> None:
            nonlocal done
            rows[digest] = row
            done += 1
            on_row(done, total, by_digest[digest], row)

        for digest, spec in by_digest.items():
            row = store.read(spec)
            if row is not None and (early_stop or "stopped" not in row):
                keep(digest, row)
        todo = [spec for digest, spec in by_digest.items() if digest not in rows]
        if todo:
            with closing(run(todo, folder=out, workers=workers, run_row=run_row, **options)) as arriving:  # type: ignore[type-var]
                for row in arriving:
                    store.write(row)
                    keep(row["digest"], row)
        return [rows[spec.digest()] for spec in specs]

    with store.writing():
        search, searched = None, []
        if search_learning_rates:
            middle = chosen[len(chosen) // 2]
            trial = replace(first, seed=seeds[0], split="train", evaluation_seed=evaluation_seed + 1)
            kinds: dict[str, int | str] = {"layer": middle, "full": "full"}
            specs = [_at(trial, layer, rate) for layer in kinds.values() for rate in search_learning_rates]
            searched = rows_of(specs)
            means = [row["mean"] for row in searched]
            n = len(search_learning_rates)
            found = dict(zip(kinds, (means[:n], means[n:]), strict=True))
            best = {kind: search_learning_rates[values.index(max(values))] for kind, values in found.items()}
            of_block, full_learning_rate = dict.fromkeys(chosen, best["layer"]), best["full"]
            search = {"rates": list(search_learning_rates), **found, "block": middle, "split": trial.split}
        untrained = replace(first, layer="base", algorithm="none", settings={}, steps=0)
        full = [_at(replace(first, seed=seed), "full", full_learning_rate) for seed in seeds]
        blocks = [[_at(replace(first, seed=seed), k, of_block[k]) for seed in seeds] for k in chosen]
        # One seed of everything first: it says most when the sweep does not get further.
        by_seed = [spec for i in range(len(seeds)) for spec in (full[i], *(of_one[i] for of_one in blocks))]
        rows = dict(zip((s.digest() for s in (untrained, *by_seed)), rows_of([untrained, *by_seed]), strict=True))
        profile = make_profile(
            model=model,
            revision=base.revision,
            num_layers=base.num_layers,
            task=task,
            seeds=seeds,
            steps=steps,
            base=rows[untrained.digest()],
            full=[rows[spec.digest()] for spec in full],
            layers={k: [rows[spec.digest()] for spec in of_one] for k, of_one in zip(chosen, blocks, strict=True)},
            searched=searched,
            learning_rate_search=search,
        )
        write_whole(out / "layer_profile.json", profile.to_json())
        write_whole(out / "layer_profile.csv", profile.to_csv())
    return profile


@dataclass(frozen=True)
class _Base:
    model: str
    revision: str | None
    digests: dict[str, str]
    num_layers: int
    has_chat_template: bool


def _describe(model: str, revision: str | None) -> _Base:
    """What the specifications need to know of a model, without its weights; a folder's path becomes absolute."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from peft_onelayer.tuner import find_decoder_stack
    from peft_onelayer.tuner.model import commit_hash

    folder = Path(model).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else model
    config = AutoConfig.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    return _Base(
        name,
        commit_hash(skeleton) or revision,
        model_digests(name),
        len(find_decoder_stack(skeleton).blocks),
        tokenizer.chat_template is not None,
    )


def _at(spec: RunSpec, layer: int | str, rate: float) -> RunSpec:
    return replace(spec, layer=layer, settings={**spec.settings, "learning_rate": rate})  # type: ignore[arg-type]


def _task_data(task: str, unsafe: bool) -> dict[str, str]:
    from peft_onelayer.tasks import load_task

    return dict(load_task(task, unsafe=unsafe).data)


def _online(algorithm: str) -> str:
    from peft_onelayer.rl.algorithms import load_algorithm

    if not load_algorithm(algorithm).online:
        raise ValueError(f"a sweep compares runs by their reward; {algorithm} is offline, choose one such as grpo")
    return algorithm


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
