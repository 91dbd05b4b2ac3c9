"""Publishes an adapter: checks it, writes what the repository will hold to a scratch folder, commits that at once.

What the card says of the training comes from the records beside the adapter.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from peft_onelayer.adapter.reader import AdapterFile, open_adapter
from peft_onelayer.adapter.validation import check_tensors
from peft_onelayer.records.fields import Record
from peft_onelayer.records.files import (
    CARD,
    CONFIG,
    PROFILE,
    RUN,
    WEIGHTS,
    read_fields,
    read_text,
    scratch_directory,
)
from peft_onelayer.records.hub_errors import LOG_IN, HubError, hub_errors
from peft_onelayer.records.locate import adapter_folder, cached_base, check_adapter_folder, is_local, last_part
from peft_onelayer.records.privacy import holds_secrets, without_private
from peft_onelayer.records.text import name_blocks, printable
from peft_onelayer.sparse.base import OtherBaseError

from .card import PLOT, REWARDS, eval_results, model_card
from .card_text import is_edited, merge_cards, own_text, split_card
from .local_card import Records, base_license, draw_pictures, read_records

RESULTS = ".eval_results/onelayer.yaml"
PEFT_EXPORT = "peft"
TEXTS = (".json", ".md", ".yaml")  # of what is published
# What a push may leave in a repository; those that a later push does not write are removed with it.
OF_PEFT = (f"{PEFT_EXPORT}/{CONFIG}", f"{PEFT_EXPORT}/{WEIGHTS}")
PUBLISHED = (CONFIG, WEIGHTS, CARD, PROFILE, PLOT, REWARDS, RUN, RESULTS, *OF_PEFT)
# What may stand in a repository that somebody made on the Hub's pages for this adapter.
STARTING_FILES = {".gitattributes", ".gitignore", CARD, "LICENSE"}

SomeRecord = TypeVar("SomeRecord", bound=Record)


@dataclass(frozen=True)
class Push:
    """What a push sent, or what a dry run would send; `to_json` is what `onelayer push --json` prints.

    Attributes:
        repo_id: the repository.
        endpoint: the Hub.
        revision: the branch.
        files: path in the repository and bytes of every file.
        encoding: "sparse" or "dense".
        notes: what a reader of the repository will miss, and why.
        commit: URL of the commit; None for a dry run.
        pull_request: URL of the pull request, if one was opened.
        card: the text of the model card.
    """

    repo_id: str
    endpoint: str
    revision: str
    files: dict[str, int]
    encoding: str
    notes: list[str] = field(default_factory=list)
    card: str = ""
    commit: str | None = None
    pull_request: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"format": "onelayer-push-1", **asdict(self)}


def push_adapter(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    evaluation: Path | str | None = None,
    base_model: str | None = None,
    dense: bool = False,
    with_peft: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    note: Callable[[str], None] | None = None,
) -> Push:
    """Publish the adapter in `folder` on the Hub, in one commit; token and endpoint are huggingface_hub's own.

    The repository gets the adapter, its configuration, a card, and, where they stand beside the adapter, the cleaned
    run.json and layer_profile.json with its plot. A repository that holds something else is left alone. A second try
    after a failure sends only what is missing. What a person wrote into the card, in `folder` or on the Hub, is kept,
    and so is the folder `PEFT_EXPORT` of an earlier push, with these weights.

    Args:
        folder: of the adapter.
        repo_id: "name" or "owner/name"; created unless it exists.
        private: whether a new repository is private; None for the account's default.
        revision: branch, created unless it exists; None for "main".
        create_pr: propose the commit as a pull request instead.
        message: of the commit.
        evaluation: what `onelayer eval --out` wrote of this adapter; by default eval.json beside it, if there is one.
        base_model: the base's Hub id, for an adapter that was trained on a local copy.
        dense: publish every weight, even where the base is at hand for the sparse encoding.
        with_peft: also publish the form that plain PEFT loads, in the folder `PEFT_EXPORT`; of a sparse adapter only
            where the base is at hand.
        license: of the adapter, such as "apache-2.0"; by default the one that the card has, or the base's.
        dry_run: send nothing and ask the Hub nothing.
        note: called with one line before anything is sent, where `repo_id` names no owner: where it goes.

    Raises:
        ValueError: no adapter, a damaged one, or records of another adapter (`HubError` for what the Hub refuses).
    """
    with hub_errors(f"push to {repo_id}"):
        validate_repo_id(repo_id)
        if base_model is not None:
            validate_repo_id(base_model)
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no adapter folder at {folder}; give the one that onelayer train wrote.")
    folder, branch = adapter_folder(folder), revision or constants.DEFAULT_REVISION
    check_adapter_folder(folder, str(folder))
    if not dry_run:
        given, repo_id = repo_id, _with_owner(repo_id)
        if note is not None and repo_id != given:
            note(f"{given} names no owner, so it goes to {constants.ENDPOINT}/{repo_id}")
    staging = partial(
        stage,
        folder,
        repo_id=repo_id,
        evaluation=None if evaluation is None else Path(evaluation),
        base_model=base_model,
        dense=dense,
        license=license,
    )
    with _scratch() as scratch:
        staged = scratch / "first"
        staged.mkdir()
        adapter, notes = staging(staged, with_peft=with_peft)
        push = Push(repo_id, constants.ENDPOINT, branch, _sizes(staged), adapter.encoding, notes, read_card(staged))
        if dry_run:
            return push
        with hub_errors(f"push to {repo_id}", repo_id):
            repo_id, there = _open_repository(push, private)
            if not with_peft and f"{PEFT_EXPORT}/{WEIGHTS}" in there:
                staged = scratch / "second"
                staged.mkdir()
                adapter, more = _with_peft_again(staging, staged, scratch / "first")
                notes = [*notes, *more]
            notes = [*notes, *_keep_their_text(staged, folder, repo_id, branch, there, license)]
            push = replace(push, repo_id=repo_id, files=_sizes(staged), notes=notes, card=read_card(staged))
            message = message or f"Adapter of {name_blocks(adapter.layers)}, with onelayer push"
            commit, pull_request = _commit(staged, push, there, create_pr=create_pr, message=message)
    return replace(push, commit=commit, pull_request=pull_request)


def _with_owner(repo_id: str) -> str:
    """The repository with its owner, by default the token's; as it is where the Hub does not say who that is.

    Raises:
        HubError: no token, or one that the Hub does not take, before minutes of preparation.
    """
    if get_token() is None:
        raise HubError(f"cannot push to {repo_id}: no token was found; {LOG_IN}.")
    try:
        with hub_errors(f"push to {repo_id}"):
            name = HfApi().whoami()["name"]
    except HubError as error:
        if isinstance(error.__cause__, HfHubHTTPError) and error.__cause__.response.status_code == 401:
            raise
        return repo_id  # no network or a busy Hub, which the push itself finds out
    return repo_id if "/" in repo_id else f"{name}/{repo_id}"


def _sizes(staged: Path) -> dict[str, int]:
    return {name: (staged / name).stat().st_size for name in PUBLISHED if (staged / name).exists()}


def read_card(folder: Path) -> str:
    """The card in a folder; "" where there is none."""
    return read_text(folder / CARD) if (folder / CARD).is_file() else ""


def _with_peft_again(
    staging: Callable[..., tuple[AdapterFile, list[str]]], staged: Path, first: Path
) -> tuple[AdapterFile, list[str]]:
    """Stage once more, with the form that plain PEFT loads, which the repository has; a note where that cannot be."""
    try:
        return staging(staged, with_peft=True)[0], []
    except ValueError as error:
        shutil.copytree(first, staged, dirs_exist_ok=True)
        note = f"{PEFT_EXPORT}/ of an earlier push, which has its weights, is removed: {error}"
        return open_adapter(staged), [note]


def _keep_their_text(
    staged: Path, folder: Path, repo_id: str, revision: str, there: set[str], license: str | None
) -> list[str]:
    """Put what was written by hand into the card on the Hub into the staged one; a note where both were edited."""
    if CARD not in there:
        return []
    ours, local = read_card(staged), read_card(folder)
    theirs = read_text(Path(hf_hub_download(repo_id, CARD, revision=revision)))
    edited_here, edited_there = is_edited(local, ours), is_edited(theirs, ours)
    license = license or split_card(local)[0].get("license")
    _write(staged / CARD, merge_cards(ours, theirs, license, fields_only=edited_here))
    if edited_here and edited_there and own_text(local) != own_text(theirs):
        return ["the card was edited here and on the Hub: this one went up, and the Hub's history keeps the other"]
    return []


def stage(
    folder: Path,
    staged: Path,
    repo_id: str | None,
    *,
    evaluation: Path | None = None,
    base_model: str | None = None,
    dense: bool = False,
    with_peft: bool = False,
    license: str | None = None,
) -> tuple[AdapterFile, list[str]]:
    """Check the adapter in `folder` and write all that a repository holds to the empty folder `staged`.

    Returns:
        The adapter as it will be published, and notes on what is missing.

    Raises:
        ValueError: as `push_adapter`.
    """
    adapter = open_adapter(folder)
    records = read_records(folder, evaluation)
    base = _local_base(adapter.config)
    if dense and adapter.encoding == "sparse":
        raise ValueError(f"{folder} is sparse already, and --dense publishes what it holds dense; leave it out.")
    if with_peft and base is None and adapter.encoding == "sparse":
        name = adapter.config.get("base_model_name_or_path")
        raise ValueError(f"--with-peft needs the base of a sparse adapter, and {name} is not here; download it.")
    parameters, _ = check_tensors(adapter, base)
    notes = _write_weights(adapter, staged, base, dense)
    license = license or base_license(adapter.config)
    notes += _write_records(staged, repo_id, records, parameters, base_model, with_peft, license)
    if there := read_card(folder):
        _write(staged / CARD, merge_cards(read_card(staged), there, license))
    if with_peft:
        _write_peft_export(adapter, base, staged)
    _check_no_secret(staged)
    return open_adapter(staged), notes


def _write_records(
    staged: Path,
    repo_id: str | None,
    records: Records,
    parameters: int,
    base_model: str | None,
    with_peft: bool,
    license: str | None,
) -> list[str]:
    """Clean adapter_config.json and write all that is not weights; notes on what the card lacks."""
    config = read_fields(staged / CONFIG)
    trained_on = records.run.settings.model if records.run else None
    given = [name for name in (config.get("base_model_name_or_path"), trained_on and trained_on.name) if name]
    # run.json has digests of a folder's files, and of a model from the Hub the commit
    of_folder = bool(trained_on and trained_on.sha256) or any(is_local(name) for name in given)
    local_base = of_folder and not base_model
    names = {name: base_model or last_part(name) for name in given if base_model or local_base}

    config = without_private(config, names)
    run, measured = _cleaned(records.run, names), _cleaned(records.evaluation, names)
    profile = _cleaned(records.profile, names)
    _write(staged / CONFIG, _to_json(config))
    if run:
        _write(staged / RUN, run.to_json())
    if profile:
        _write(staged / PROFILE, profile.to_json())
    if measured and (entries := eval_results(measured)):
        (staged / RESULTS).parent.mkdir()
        _write(staged / RESULTS, yaml_dump(entries, sort_keys=False))
    card = model_card(
        config,
        run,
        measured,
        profile,
        repo_id=repo_id,
        parameters=parameters,
        peft_export=PEFT_EXPORT if with_peft else None,
        local_base=local_base,
        license=license,
        pictures=draw_pictures(Records(run, measured, profile), staged),
    )
    _write(staged / CARD, card)
    if not local_base:
        return []
    return [
        "the base is a local folder, so the card names no base on the Hub, and search will not find the adapter by it; "
        "give its Hub id with --base-model"
    ]


def _cleaned(record: SomeRecord | None, names: Mapping[str, str]) -> SomeRecord | None:
    return record and record.from_dict(without_private(record.to_dict(), names), record.WHAT)


def _write_weights(adapter: AdapterFile, staged: Path, base: Path | None, dense: bool) -> list[str]:
    """Write the weights and their configuration, sparse where the base is at hand; notes on why not."""
    if dense or adapter.encoding == "sparse":
        _copy_weights(adapter.folder, staged)
        return []
    if base is None:
        _copy_weights(adapter.folder, staged)
        name = adapter.config.get("base_model_name_or_path")
        return [
            f"the base {name} is not on this machine as safetensors, so the adapter goes up dense; download it to "
            "publish sparse"
        ]
    if "quantization_config" in read_fields(base / "config.json"):
        raise ValueError(
            f"the base in {base} is quantized, and the sparse encoding is of what differs from floating-point weights; "
            "--dense publishes the adapter."
        )
    from peft_onelayer.adapter.write_sparse import write_sparse

    with _scratch() as scratch:
        try:
            write_sparse(adapter, scratch / "sparse", base)
        except OtherBaseError as error:
            way = " --dense publishes it without a look at the base." if error.way_out else ""
            raise ValueError(f"{error.problem}{way}") from error
        _copy_weights(scratch / "sparse", staged)
    return []


def _copy_weights(folder: Path, staged: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(folder / name, staged / name)


def _local_base(config: dict[str, Any]) -> Path | None:
    """The base's checkpoint folder: where it was trained from, or in the Hub's cache."""
    name = config.get("base_model_name_or_path")
    return Path(name) if name and Path(name).is_dir() else cached_base(config)


def _write_peft_export(adapter: AdapterFile, base: Path | None, staged: Path) -> None:
    from peft_onelayer.adapter.export import export_adapter

    out = staged / PEFT_EXPORT
    export_adapter(adapter.folder, out, format="peft", base=base)
    for path in list(out.iterdir()):
        if path.name not in (CONFIG, WEIGHTS):
            path.unlink()
    name = read_fields(staged / CONFIG)["base_model_name_or_path"]
    exported = without_private(read_fields(out / CONFIG))
    _write(out / CONFIG, _to_json({**exported, "base_model_name_or_path": name}))


def _scratch() -> AbstractContextManager[Path]:
    """An empty folder among the temporary files; after a kill the next push removes it."""
    return scratch_directory(Path(tempfile.gettempdir()) / f"onelayer-push-{secrets.token_hex(8)}")


def _check_no_secret(staged: Path) -> None:
    """The last look before anything leaves the machine."""
    for path in staged.rglob("*"):
        if path.suffix in TEXTS and holds_secrets(path.read_text(encoding="utf-8")):
            raise ValueError(f"{path.name} would publish a secret; remove it from the records beside the adapter.")


def _open_repository(push: Push, private: bool | None) -> tuple[str, set[str]]:
    """(repository with its owner, the files there); it and its branch are made where they are not there."""
    api = HfApi()
    repo_id = api.create_repo(push.repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise HubError(
            f"cannot push to {repo_id}: it exists and is public; make it private in its settings on the Hub, or "
            "leave out --private (nothing was changed)."
        )
    main = push.revision == constants.DEFAULT_REVISION
    there = _files_there(api, repo_id, push.revision, may_be_missing=not main)
    if there is None:
        api.create_branch(repo_id, branch=push.revision, exist_ok=True)
        there = _files_there(api, repo_id, push.revision) or set()
    _check_ours(repo_id, push.revision, there)
    return repo_id, there


def _commit(staged: Path, push: Push, there: set[str], *, create_pr: bool, message: str) -> tuple[str, str | None]:
    """(URL of the commit, URL of the pull request)."""
    stale = sorted(there & (set(PUBLISHED) - set(push.files)))
    done = HfApi().create_commit(
        push.repo_id,
        [
            *(CommitOperationAdd(name, staged / name) for name in push.files),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=message,
        revision=push.revision,
        create_pr=create_pr,
    )
    return done.commit_url, done.pr_url


def _files_there(api: HfApi, repo_id: str, revision: str, may_be_missing: bool = False) -> set[str] | None:
    try:
        return {file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or []}
    except RevisionNotFoundError:
        if may_be_missing:
            return None
        raise


def _check_ours(repo_id: str, revision: str, there: set[str]) -> None:
    """Refuse to write over a repository that holds something else."""
    if CONFIG in there:
        path = hf_hub_download(repo_id, CONFIG, revision=revision)
        try:
            kind = read_fields(Path(path)).get("peft_type")
        except ValueError:
            kind = "unknown"
        if kind == "SINGLE_LAYER":
            return
        what = f"an adapter of another kind ({printable(kind, 40)})"
    elif others := sorted(there - STARTING_FILES):
        what = f"other files ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
    else:
        return
    raise HubError(f"cannot push to {repo_id}: it exists and holds {what}; choose another name (nothing was changed).")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _to_json(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"
