"""Opens the base model and the adapter that a run was given, and says in one line what is wrong with them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HTTPError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.records.files import CONFIG, read_fields
from peft_onelayer.records.hub_errors import hub_reason, no_vain_retries
from peft_onelayer.records.locate import cached_commit, check_model_name, is_local
from peft_onelayer.records.text import one_line
from peft_onelayer.rl.cpu_products import use_float32_units
from peft_onelayer.seams import check

SMALL = 10_000_000  # parameters; below, a second thread gains nothing and on a busy machine costs a factor of ten

# Errors of the libraries whose text says what is wrong; of others the name says more. RuntimeError: of hf_xet.
SPOKEN = (OSError, ValueError, RuntimeError, HTTPError, ImportError)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without the progress bars of transformers, datasets and huggingface_hub."""
    import datasets
    from huggingface_hub import utils as hub

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of the algorithms and environments it calls experimental
    log = transformers.utils.logging
    hidden = not log.is_progress_bar_enabled(), datasets.are_progress_bars_disabled(), hub.are_progress_bars_disabled()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        enablers = (log.enable_progress_bar, datasets.enable_progress_bars, hub.enable_progress_bars)
        for was_hidden, enable in zip(hidden, enablers, strict=True):
            if not was_hidden:
                enable()


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Without load reports and lines about retries: what fails is said once, by an error."""
    from huggingface_hub.utils import logging as hub_log

    log = transformers.utils.logging
    verbosity, hub_verbosity = log.get_verbosity(), hub_log.get_verbosity()
    log.set_verbosity_error()
    hub_log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        hub_log.set_verbosity(hub_verbosity)


def load_causal_lm(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or from the Hub, there at a branch, tag or commit.

    Args:
        trust_remote_code: run the Python code that comes with the model.

    Returns:
        The model in the dtype of its checkpoint, in eval mode, and its tokenizer.

    Raises:
        ValueError: in one line: not there, not a causal language model, incomplete, without a tokenizer, or with code
            of its own that was not allowed to run.
    """
    source = _source(name)
    trusted = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # left out, transformers asks on the terminal
    with _errors_in_one_line(name), quiet_logs():
        _checked_config(source, trusted)
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True, **trusted)
        _note_commit(model.config, source, revision)
        if info["missing_keys"]:
            missing = info["missing_keys"]
            raise NotCausalError(f"{source} lacks {len(missing)} weights, such as {min(missing)}.")
        return model, AutoTokenizer.from_pretrained(source, **trusted)


def load_skeleton(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without weights, on the meta device, and its tokenizer: enough to look at before a run.

    Raises:
        ValueError: in one line: as `load_causal_lm`; a folder that holds no weights at all.
    """
    source = _source(name)
    trusted = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _errors_in_one_line(name), quiet_logs():
        config = _checked_config(source, trusted)
        if is_local(name) and not any(Path(source).glob("*.safetensors")) and not any(Path(source).glob("*.bin")):
            raise NotCausalError(f"{source} holds no weights; expected *.safetensors beside its config.json.")
        tokenizer = AutoTokenizer.from_pretrained(source, **trusted)
    model = build_skeleton(name, config, trust_remote_code=trust_remote_code)
    _note_commit(model.config, source, revision)
    return model, tokenizer


def build_skeleton(name: str, config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration without weights, on the meta device.

    Raises:
        ValueError: in one line: the configuration's values make no model.
    """
    with _errors_in_one_line(name), quiet_logs(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_config(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a causal language model, which may be all that is there of it.

    Raises:
        ValueError: in one line: not there, or not a causal language model.
    """
    trusted = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _errors_in_one_line(name), quiet_logs():
        return _checked_config(_source(name), trusted)


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a configuration; None where there is none, or an empty one made from the configuration."""
    with quiet_logs():
        try:
            found = AutoTokenizer.from_pretrained(_source(name), revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, ImportError):
            return None
    return found if set(found.get_vocab()) - set(found.all_special_tokens) else None


def _source(name: str) -> str:
    check_model_name(name)
    return str(Path(name).expanduser()) if is_local(name) else name


def _checked_config(source: str, trusted: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a model that is a causal language model, by transformers or by its own code."""
    check(__name__)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(source, **trusted)
    if trusted["trust_remote_code"] and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return config
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    accepted = (causal,) if isinstance(causal, str) else tuple(causal or ())
    architectures = config.architectures or accepted
    architectures = [architectures] if isinstance(architectures, str) else architectures
    if not set(architectures) & set(accepted):
        raise NotCausalError(
            f"{source} is a {', '.join(architectures) or config.model_type}, not a causal language model "
            f"({config.model_type} {'has ' + accepted[0] if accepted else 'has none'})."
        )
    return config


def _note_commit(config: PretrainedConfig, source: str, revision: str | None) -> None:
    """Set what transformers before 5.23 sets: the Hub commit that was loaded."""
    if getattr(config, "_commit_hash", None) is None and (commit := cached_commit(source, revision)):
        config._commit_hash = commit


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    try:
        with no_vain_retries():
            yield
    except NotCausalError:
        raise
    except Exception as error:  # a configuration may hold any value, and a division by zero ends in its model's code
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} comes with Python code of its own, which runs with all your rights; read it, and if you trust "
                "it give --trust-remote-code (in Python trust_remote_code=True)"
            ) from error
        source = Path(name).expanduser()
        why = None if is_local(name) else hub_reason(error, name)
        what = f"the model in {source}" if is_local(name) else f"the model {name}"
        what = f"{name}, neither a folder here nor found on the Hub" if why else what
        said = one_line(error) if isinstance(error, SPOKEN) else f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"cannot load {what}: {why or said}") from error


class NotCausalError(ValueError):
    """The model was found, and is none that can be trained."""


def to_device(model: PreTrainedModel) -> None:
    """Move a model that is on the CPU to the process's GPU, if there is one.

    There is none: a small model gets a single thread, a larger one the float32 units, where the CPU has no instructions
    for its dtype.
    """
    if torch.cuda.is_available() and model.device.type == "cpu":
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    if sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    elif model.device.type == "cpu":
        use_float32_units(model.dtype)


def fingerprint(base: PreTrainedModel) -> set[tuple[int | str, float | None]]:
    """What tells whether loading an adapter changed the base, so that switching it off does not give the base back:
    it did unless `before <= after`.

    PiSSA takes its part out of the weights, `bias` of LoRA writes over biases, and `layer_replication` adds blocks.
    Quantized and offloaded weights, of which no norm can be taken, are not looked at: nothing writes to them.
    """
    plain = [p for p in base.parameters() if type(p.data) is torch.Tensor and p.is_floating_point() and not p.is_meta]
    norms = {(id(p), float(p.detach().float().norm())) for p in plain}
    return norms | {("blocks", getattr(base.config.get_text_config(), "num_hidden_layers", None))}


def load_adapter(base: PreTrainedModel, folder: Path, allow_other_base: bool = False) -> PeftModel:
    """Wrap `base` with the adapter of any PEFT type saved in `folder`, in eval mode.

    Args:
        allow_other_base: take a base that an adapter of our method was not trained on.

    Raises:
        ValueError: in one line: not an adapter, damaged, or made for a model of other shapes.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*Found missing adapter keys", category=UserWarning)
            options = {}
            if read_fields(folder / CONFIG).get("peft_type") == "SINGLE_LAYER":
                open_adapter(folder)  # reads every field, and names what is wrong
                options = {"allow_other_base": allow_other_base}
            model = PeftModel.from_pretrained(base, str(folder), **options)
            # from_pretrained says nothing of weights without a place: those of a deeper model, for example.
            unexpected = model.load_adapter(str(folder), "default").unexpected_keys
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # load_state_dict lists every tensor below a heading
        reason = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else str(error)
        limit = 1000 if isinstance(error, ValueError) else 300  # ours says at its end what to do
        raise ValueError(
            f"the adapter in {folder} does not load on {base.name_or_path}: {one_line(reason, limit)}"
        ) from error
    if unexpected:
        raise ValueError(
            f"the adapter in {folder} has {len(unexpected)} weights that {base.name_or_path} has no place for, such as "
            f"{min(unexpected)}."
        )
    return model.eval()
