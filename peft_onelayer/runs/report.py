"""Reads what a report is about: runs, evaluations, rankings and sweeps in folders and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_onelayer.hub.profiles import load_profile, shipped_profiles
from peft_onelayer.probe.prior import depth_prior
from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.files import EVALUATION, PROFILE, RUN, parse_fields, read_fields, read_text
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import RunRecord
from peft_onelayer.records.text import printable
from peft_onelayer.report.page import CURVES, Subject

from .log import LOG


def read_subject(name: str) -> Subject:
    """What a folder of a run, of a sweep or of a demo holds, or a JSON file with a ranking, a run or an evaluation.

    Raises:
        ValueError: in one line: nothing of the kind there, or a record with a wrong field.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "adapter" if not any((path / f).is_file() for f in (RUN, PROFILE, EVALUATION)) else path
        files = {file: path / file for file in (RUN, PROFILE, EVALUATION) if (path / file).is_file()}
        if not files:
            raise ValueError(f"{name} holds no {RUN}, {PROFILE} or {EVALUATION}; give the folder of a run or a sweep")
    elif path.is_file():
        files = {_kind(path): path}
    else:
        raise ValueError(f"no file or folder {name}; give the folder of a run or a sweep, or a JSON file of one")
    ranking = LayerRanking.from_file(files[PROFILE]) if PROFILE in files else None
    weights = list(path.glob("*.safetensors")) if path.is_dir() else []
    return Subject(
        name,
        run=RunRecord.from_file(files[RUN]) if RUN in files else None,
        evaluation=EvaluationRecord.from_file(files[EVALUATION]) if EVALUATION in files else None,
        ranking=ranking,
        log=_log(path / LOG) if path.is_dir() else [],
        bytes=sum(file.stat().st_size for file in weights) or None,
        beside=_beside(ranking) if ranking else {},
    )


def _kind(path: Path) -> str:
    found = read_fields(path).get("format")
    for name, kind in ((RUN, RunRecord), (EVALUATION, EvaluationRecord)):
        if found == kind.FORMAT:
            return name
    return PROFILE  # whose reader says what else it may be


def _log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; one that a killed run left torn is left out.

    Raises:
        ValueError: something else than numbers in one of them.
    """
    lines = []
    for text in read_text(path).splitlines() if path.is_file() else []:
        try:
            lines.append(parse_fields(text, str(path)))
        except ValueError:
            break
    for line in lines:
        for name in CURVES:
            if type(value := line.get(name, 0)) not in (int, float):
                step = printable(line.get("step"))
                raise ValueError(f"{path}: {name} of step {step} is {printable(value)}, expected a number")
    return [line for line in lines if type(line.get("step")) is int]


def _beside(ranking: LayerRanking) -> dict[str, list[float | None]]:
    """What is known of the blocks without a measurement: by their depth and, of a published model, from the paper."""
    found: dict[str, list[float | None]] = {}
    if ranking.method != "prior":
        found["depth prior"] = list(depth_prior(ranking.num_layers))
    if ranking.model in shipped_profiles() and ranking.method != "published":
        found["published contribution"] = load_profile(ranking.model).scores
    return found
