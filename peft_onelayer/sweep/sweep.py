"""The sweep: every block trained alone, the base and the full model beside them, evaluated on the same problems.

Each row is kept as it arrives, and only runs without a row are handed to an engine; so a sweep that was stopped,
however, goes on where it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft_onelayer.records.files import PROFILE, TargetError, output, read_text, write_whole
from peft_onelayer.records.privacy import holds_secrets, without_secrets
from peft_onelayer.records.ranking import LayerRanking, Sweep
from peft_onelayer.runs.models import without_progress_bars

from .early import ROWS, check_target
from .engines import load_engine
from .plan import Plan, plan_sweep
from .profile import make_profile
from .regimes import EQUAL, added_runs, at_one_rate, describe_added
from .run_layer import Row, RunSpec, run_layer
from .settings import SweepSettings
from .store import RowStore

OnRow = Callable[[int, int, RunSpec, Row], None]


def sweep_layers(
    settings: SweepSettings,
    *,
    out: str | Path,
    engine: str = "local",
    workers: int | None = None,
    engine_options: Mapping[str, Any] | None = None,
    run_row: Callable[[RunSpec], Row] = run_layer,
    on_start: Callable[[int], None] = lambda total: None,
    on_note: Callable[[str], None] = lambda line: None,
    on_row: OnRow = lambda done, total, spec, row: None,
) -> LayerRanking:
    """Measure the layer contribution of the blocks that `settings` name, and write the profile into `out`.

    One run per block and seed, full-parameter runs of the same seeds, and the base, all on the same problems of the
    test split. Rows already in `out/rows` are not run again; run the same call again to go on after a kill.

    Args:
        out: folder for rows/, layer_profile.json and layer_profile.csv; made if it is not there.
        engine: "local", "shared", "ray" or "slurm".
        workers: runs at a time (default: the engine's).
        engine_options: arguments of the engine's own.
        run_row: the function that makes a row.
        on_start: called with the number of rows, when all checks are done.
        on_note: told which runs the regimes add, where they are asked for, and how many runs are there already.
        on_row: called with (rows done, rows in all, specification, row), also for rows that were there already, and
            for those of runs that find a learning rate.

    Raises:
        ValueError: a setting that cannot work; a learning rate that is to be found, where nothing can be learned.
        TargetError: `out` may not be written, no sweep made it, it holds the profile of a sweep with other settings or
            with seeds or blocks that are not asked for, or another process writes to it.
        RunsFailedError: some runs failed; the rows of all others are kept.
        DiskFullError: a row could not be written.
    """
    out, options = Path(out), dict(engine_options or {})
    run = load_engine(engine)
    if engine not in ("local", "shared") and holds_secrets(settings.config):
        raise ValueError(
            f"the settings hold a secret, and the engine {engine} would keep it in its files; use the engine local, or "
            "leave the secret to the environment of the workers"
        )
    check_target(out)
    with output(out, "finished rows are kept, and the same command runs the others"):
        with without_progress_bars():
            before = _profile_in(out)
            settings, block = _going_on(settings, before)
            plan = plan_sweep(settings, block)
        store = RowStore(out / ROWS)
        store.prepare()
        if before is not None:
            _check_profile(out, before, plan, settings, store)
        counter, total = itertools.count(1), len(plan.specs) + len(plan.of_rates)
        if settings.regimes:
            total += len(added_runs(plan, settings))
            on_note(describe_added(plan, settings))
        on_start(total)
        rows_of = partial(
            collect_rows,
            store=store,
            run=partial(run, folder=out, workers=workers, run_row=run_row, **options),
            stopped_count=bool(options.get("early_stop")),
            on_row=lambda spec, row: on_row(next(counter), total, spec, row),
        )
        rows = rows_of(plan.of_rates)
        plan = plan.with_learning_rates(rows)
        if before is not None:
            _check_rates(out, before, plan, settings)
        if there := sum(store.read(spec) is not None for spec in plan.specs):
            on_note(f"{there} of {len(plan.specs)} runs are in {out / ROWS} already and are not run again")
        rows |= rows_of(plan.specs)
        if settings.regimes:  # those that are there already, at a tuned rate, are taken from the store
            rows |= rows_of(added_runs(plan, settings))
        profile = make_profile(settings, plan, rows)
        write_whole(out / PROFILE, profile.to_json())
        write_whole(out / Path(PROFILE).with_suffix(".csv"), profile.to_csv())
    return profile


def _profile_in(out: Path) -> LayerRanking | None:
    """The profile that `out` holds."""
    path = out / PROFILE
    return LayerRanking.from_json(read_text(path), str(path)) if path.exists() else None


def _going_on(settings: SweepSettings, before: LayerRanking | None) -> tuple[SweepSettings, int | None]:
    """The settings with the seeds of the profile `before` first, and the block that found its rate, for `plan_sweep`.

    So a sweep with more seeds and blocks finds the rate by the same run, whose row it has.
    """
    if before is None or before.sweep is None:
        return settings, None
    old = before.sweep.seeds or []
    seeds = sorted(settings.seeds, key=lambda seed: old.index(seed) if seed in old else len(old))
    found = before.sweep.learning_rates_found or before.sweep.learning_rate_search or {}
    return replace(settings, seeds=seeds), found.get("block")


def _check_profile(out: Path, profile: LayerRanking, plan: Plan, settings: SweepSettings, store: RowStore) -> None:
    """Raise TargetError where `out` holds a profile that the new one would not continue but replace.

    The rates themselves are compared by `_check_rates`, when those that are searched for or found are known.
    """
    before = profile.sweep or Sweep([], None, None)
    now = {name: value for name, value in plan.full[0].settings.items() if name != "learning_rate"}
    compared: dict[str, tuple[Any, Any]] = {
        "--task": (profile.task, plan.base.task),
        "--algorithm": (before.algorithm, settings.algorithm),
        "--steps": (before.steps, settings.steps),
        "--set": (before.settings, without_secrets(now)),
    }
    if plan.search:
        searched = (before.learning_rate_search or {}).get("rates")
        compared["--search-learning-rates"] = (searched, list(plan.search.rates))
    if before.regimes:
        compared["--regimes"] = (True, settings.regimes)
    found = before.learning_rates_found or {}
    if "layer" in plan.finding and "layer" not in found:
        compared["--learning-rate"] = (profile.learning_rate, "auto")
    if "full" in plan.finding and "full" not in found:
        compared["--full-learning-rate"] = (before.full_learning_rate, "auto")
    _refuse_others(out, compared)
    if not store.path(plan.base.digest()).exists():
        raise TargetError(
            f"{out} holds the profile of a sweep of another model, or evaluated otherwise (--problems, --samples, "
            f"...); give another --out, or take {PROFILE} away."
        )
    _refuse_less(out, "seeds", before.seeds or [], settings.seeds, "--seeds")
    _refuse_less(out, "blocks", _blocks(profile), plan.blocks, "--layers")


def _check_rates(out: Path, profile: LayerRanking, plan: Plan, settings: SweepSettings) -> None:
    """Raise TargetError where `out` holds a profile of other rates than those of `plan`, which are all known."""
    before = profile.sweep or Sweep([], None, None)
    compared = {"--full-learning-rate": (before.full_learning_rate, plan.full[0].settings["learning_rate"])}
    old = profile.learning_rates or [profile.learning_rate] * profile.num_layers
    for k in _blocks(profile):
        if old[k] is not None:  # no block was measured to the end
            compared[f"block {k} at --learning-rate"] = (old[k], plan.blocks[k][0].settings["learning_rate"])
    if before.regimes and settings.regimes:
        equal = at_one_rate(plan, settings).full[0].settings["learning_rate"]
        compared["--regimes at --learning-rate"] = (before.regimes[EQUAL]["block_rate"], equal)
    _refuse_others(out, compared)


def _blocks(profile: LayerRanking) -> list[int]:
    """The blocks that a sweep's profile is of, those that were stopped early among them."""
    return sorted({*profile.order, *map(int, profile.sweep.stopped if profile.sweep else ())})


def _refuse_less(out: Path, what: str, old: Collection[int], new: Collection[int], option: str) -> None:
    """Raise TargetError where not all seeds, or blocks, of the profile are asked for."""
    if not set(old) <= set(new):
        raise TargetError(
            f"{out} holds a profile of {what} {', '.join(map(str, old))}; ask for {option} "
            f"{','.join(map(str, sorted({*old, *new})))} to add to it, or give another --out"
        )


def _refuse_others(out: Path, compared: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise TargetError for the first option, if any, whose value in the profile is not the one that is asked for."""
    for option, (old, new) in compared.items():
        if old != new:
            raise TargetError(
                f"{out} holds the profile of a sweep with {option} {old}, and {new} is asked for; give another --out, "
                f"or take {PROFILE} away."
            )


def collect_rows(
    specs: Sequence[RunSpec],
    *,
    store: RowStore,
    run: Callable[[Sequence[RunSpec]], Iterator[Row]],
    stopped_count: bool = False,
    on_row: Callable[[RunSpec, Row], None] = lambda spec, row: None,
) -> dict[str, Row]:
    """The rows by the digests of their specifications: those that the store has, and those that `run` gives it.

    Args:
        run: yields the rows of the specifications that it is given, as an engine does.
        stopped_count: whether the row of a run that was stopped early counts as one.
    """
    rows: dict[str, Row] = {}
    missing: dict[str, RunSpec] = {}
    for spec in specs:
        row = store.read(spec)
        if row is None or ("stopped" in row and not stopped_count):
            missing[spec.digest()] = spec
        else:
            rows[spec.digest()] = row
            on_row(spec, row)
    if missing:
        with closing(run(list(missing.values()))) as arriving:  # type: ignore[type-var]
            for row in arriving:
                store.write(row)
                rows[row["digest"]] = row
                on_row(missing[row["digest"]], row)
    return rows
