"""Problems from a data set that has an end: a local file (JSONL, CSV, Parquet) or folder, or a data set on the Hub.

All of it is read into memory, split into "train" and "test", and drawn from. A task names the columns that it needs,
and makes its rows from what is drawn here.

Where the splits come from:

    org/name[:config][@revision]   the Hub data set's own "train" and "test"
    folder/                        its one *train* file and its one *test* file
    gsm8k_test.jsonl               the name says test (or train): that split alone
    problems.csv                   one problem in eight, by a hash of its text, is "test"; the others are "train"
"""

import csv
import gzip
import hashlib
import json
import random
import re
import tempfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_onelayer.records.files import file_digest
from peft_onelayer.records.text import one_line
from peft_onelayer.tasks import HELD_OUT
from peft_onelayer.tasks.rows import check_columns

TABLES = (".csv", ".parquet")
SUFFIXES = (".jsonl", ".jsonl.gz", *TABLES)
HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")

Row = dict[str, Any]


@dataclass(frozen=True)
class Problems:
    """The problems of a data set by split.

    Attributes:
        source: as given to `load_problems`.
        splits: the rows of "train", of "test", or of both. No row is there twice, and no problem is in both.
        data: what was read, for `Task.data`: a file's name with its sha256, or a Hub data set with its commit.
    """

    source: str
    splits: Mapping[str, Sequence[Row]] = field(repr=False)
    data: Mapping[str, str]

    @property
    def train_size(self) -> int:
        """Number of "train" rows."""
        return len(self.splits.get("train", ()))

    def rows(self, split: str, n: int, seed: int) -> list[Row]:
        """Return `n` distinct rows of a split in an order drawn by `seed`, or all of them where there are fewer.

        The rows for a smaller `n` are the first of those for a larger one.

        Raises:
            ValueError: for an unknown split, one that this data does not have, or n < 1.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if not self.splits.get(split):
            raise ValueError(f"{self.source} has no {split!r} problems; give data that has them")
        rows = self.splits[split]
        order = random.Random(f"{split} {seed}").sample(range(len(rows)), len(rows))
        return [dict(rows[i]) for i in order[:n]]


def load_problems(source: str, columns: Sequence[str]) -> Problems:
    """Read the problems of `source`, a path or a Hub data set, split as the head of this module says.

    Repeated rows are kept once. A train problem that is in the test split too is left out of "train", with a warning.

    Args:
        source: "org/name", "org/name:config@revision", a folder, or a .jsonl, .jsonl.gz, .csv or .parquet file.
        columns: those that every row must have; the first one holds the problem, by which the splits are kept apart.

    Raises:
        ValueError: for data that is not there or cannot be read, and for a bad line with its file and number.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = {split: _only_file(path, split) for split in ("train", "test")}
        found = {split: file for split, file in files.items() if file is not None}
        if not found:
            raise ValueError(f"folder {path} holds no *train*.jsonl and no *test*.jsonl ({', '.join(SUFFIXES)})")
        splits = {split: read_rows(file, columns) for split, file in found.items()}
        data = {file.name: digest(file) for file in found.values()}
    elif path.is_file():
        rows = read_rows(path, columns)
        data = {path.name: digest(path)}
        named = [split for split in ("train", "test") if split in _words(path)]
        if len(named) == 1:
            splits = {named[0]: rows}
        else:
            splits = {"train": [], "test": []}
            for row in rows:
                splits["test" if is_held_out(_text(row[columns[0]])) else "train"].append(row)
    else:
        check_named(source)
        hub = HUB.fullmatch(source)
        assert hub is not None
        splits, data = read_hub(source, hub["repo"], hub["config"], hub["revision"], columns)
    for rows in splits.values():
        check_columns(source, rows[0] if rows else {})
    splits = {split: list({_text(row): row for row in rows}.values()) for split, rows in splits.items()}
    if len(splits) == 2:
        test = {_text(row[columns[0]]) for row in splits["test"]}
        train = [row for row in splits["train"] if _text(row[columns[0]]) not in test]
        if left_out := len(splits["train"]) - len(train):
            warnings.warn(f"{source}: {left_out} train problems are test problems too and are left out", stacklevel=2)
        splits["train"] = train
    return Problems(source, splits, data)


def check_named(source: str) -> None:
    """Raise ValueError for what is neither a file or folder that is there nor the name of a Hub data set."""
    if not Path(source).expanduser().exists() and (source.endswith(SUFFIXES) or not HUB.fullmatch(source)):
        raise ValueError(f"no file or folder {source}; expected one, or a Hub data set such as 'openai/gsm8k:main'")


def is_held_out(problem: str) -> bool:
    """Tell whether a problem belongs to the test split, by the sha256 of its text: one in `HELD_OUT` does."""
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) % HELD_OUT == 0


def _text(value: Any) -> str:
    """Return what identifies a problem or a row: a string itself, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _words(path: Path) -> set[str]:
    # whole words: "latest.jsonl" and "constrained.jsonl" say nothing about a split
    return set(re.findall("[a-z]+", path.name.lower()))


def _only_file(folder: Path, split: str) -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and split in _words(path))
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"folder {folder} holds several files named {split} ({names}); give one of them, or move them")
    return files[0] if files else None


def digest(path: Path) -> str:
    """What identifies a file in `Task.data`."""
    return f"sha256:{file_digest(path)}"


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read the rows of a file of any of `SUFFIXES`, all with the same columns, `columns` among them. Every value of a
    CSV file is text, so that "007" stays what it is.

    Raises:
        ValueError: as `read_jsonl`; a table that cannot be read.
    """
    if path.suffix not in TABLES:
        return read_jsonl(path, columns)
    rows = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    if not rows:
        raise ValueError(f"{path} is empty; expected a row for each problem")
    _check_columns(str(path), rows[0], columns)
    return rows


def _read_csv(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[Row] = []
            for row in reader:
                if None in row or None in row.values():
                    names = ", ".join(reader.fieldnames or [])
                    raise ValueError(f"line {reader.line_num} has not one value for each of the columns {names}")
                rows.append(row)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    try:
        with tempfile.TemporaryDirectory() as scratch:
            return Dataset.from_parquet(str(path), cache_dir=scratch, keep_in_memory=True).to_list()
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error.__cause__ or error)}") from error


def read_jsonl(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read the objects of a .jsonl or .jsonl.gz file, all with the same columns, `columns` among them.

    Raises:
        ValueError: for a file that cannot be read or is empty, and for a bad line with its number.
    """
    try:
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not one JSON object: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:60].decode(errors='replace')!r}")
        _check_columns(f"{path}:{number}", row, columns)
        # datasets.Dataset.from_list takes the first row's columns and fills or drops the others without a word
        if rows and row.keys() != rows[0].keys():
            names, first = ", ".join(row), ", ".join(rows[0])
            raise ValueError(f"{path}:{number}: has the columns {names}, but the first line has {first}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; expected one JSON object per line")
    return rows


def read_hub(
    source: str, repo: str, config: str | None, revision: str | None, columns: Sequence[str]
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Load the "train" and "test" splits, whichever a Hub data set has, and what identifies them: name and commit.

    Raises:
        ValueError: for a data set that cannot be loaded, has neither split, or lacks one of `columns`.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    from peft_onelayer.records.hub_errors import hub_reason, no_vain_retries

    try:
        with no_vain_retries() as unknown:
            loaded = load_dataset(repo, config, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        why = one_line(error)
        if unknown:  # datasets says neither why nor from what
            why = f"{hub_reason(unknown[0], None)} A copy here is given by its path: gsm8k:PATH, --dataset PATH"
        raise ValueError(f"data set {source} is no local path and could not be loaded from the Hub: {why}") from error
    splits = {split: loaded[split].to_list() for split in ("train", "test") if split in loaded}
    if not splits:
        raise ValueError(f"data set {source} has neither a 'train' nor a 'test' split, but {', '.join(loaded)}")
    for split, rows in splits.items():
        _check_columns(f"data set {source}, split {split!r}", rows[0] if rows else {}, columns)
    # The cache keeps a data set in a folder named by its commit; one held in memory has only a fingerprint.
    dataset = loaded[next(iter(splits))]
    commit = next((Path(file["filename"]).parent.name for file in dataset.cache_files), dataset._fingerprint)
    # Offline, datasets takes the newest cached commit whatever was asked for (load.py, CachedDatasetModuleFactory).
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and commit != revision:
        raise ValueError(f"data set {source} was asked for, but only commit {commit} is in the cache")
    return splits, {source: commit}


def _check_columns(where: str, row: Row, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in row]:
        raise ValueError(f"{where}: no column {missing[0]!r}; found {', '.join(row) or 'nothing'}")
