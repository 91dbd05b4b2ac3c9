"""Opens the base model and the adapter that a command was given, and says in one line what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._errors import UserError
from ._output import status

SMALL = 10_000_000  # parameters; below, a second thread gains nothing and on a busy machine costs a factor of ten
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_causal_lm(name: str, revision: str | None = None):
    """Load model and tokenizer from a folder or from the Hub, there at a branch, tag or commit.

    Returns:
        The model in the dtype of its checkpoint, in eval mode, and its tokenizer.

    Raises:
        UserError: not there, not a causal language model, incomplete, or without a tokenizer.
    """
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    folder = Path(name).expanduser()
    is_path = folder.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if is_path:
        if not folder.is_dir():
            raise UserError(f"no model folder at {folder}; give a folder with config.json, or a model id on the Hub.")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no config.json, so it is not a model folder.")
        name = str(folder)
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity_error()  # its load report is replaced by the checks below
    hub_logging.set_verbosity_error()  # its retries
    logging.disable_progress_bar()
    try:
        with status(f"loading {name} ..." if is_path else f"no folder {name} here; looking for it on the Hub ..."):
            config = AutoConfig.from_pretrained(name, revision=revision)
            causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
            accepted = (causal,) if isinstance(causal, str) else tuple(causal or ())
            architectures = config.architectures or accepted
            if not set(architectures) & set(accepted):
                raise UserError(
                    f"{name} is a {', '.join(architectures) or config.model_type}, not a causal language model "
                    f"({config.model_type} {'has ' + accepted[0] if accepted else 'has none'})."
                )
            model, info = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype="auto", output_loading_info=True
            )
            if info["missing_keys"]:
                raise UserError(
                    f"{name} lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}."
                )
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError, HTTPError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = f"the model in {name}" if is_path else f"{name}, neither a folder here nor found on the Hub"
        raise UserError(f"cannot load {what}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        logging.enable_progress_bar()
    return model, tokenizer


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the Hub's lines about retries and its progress bars: what fails is said once, by an error."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()


def to_device(model) -> None:
    """Move a model that is on the CPU to the process's GPU, if there is one; a small one gets a single thread."""
    import torch

    if torch.cuda.is_available() and model.device.type == "cpu":
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    limit_threads(model)


def limit_threads(model) -> None:
    """One thread for a small model."""
    import torch

    if sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)


def find_adapter(name: str) -> Path:
    """The folder of an adapter: `name` itself, or a copy in the Hub's cache of the two files that make an adapter.

    Raises:
        UserError: not there, or no adapter whose weights are a safetensors file.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "~", os.sep)) or name.count("/") != 1:
        if not folder.is_dir():
            raise UserError(f"no adapter folder at {folder}; give a folder with {ADAPTER_FILES[0]}, or a Hub id.")
    else:
        try:
            with status(f"no folder {name} here; looking for it on the Hub ..."), quiet_hub():
                folder = Path(snapshot_download(name, allow_patterns=list(ADAPTER_FILES)))
        except (OSError, ValueError, HTTPError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{name} is neither an adapter folder here nor found on the Hub: {reason}") from error
    for file in ADAPTER_FILES:  # an adapter_model.bin would be unpickled
        if not (folder / file).is_file():
            inside = folder / "adapter"  # where `onelayer train` and `demo` put it
            hint = f"; did you mean {inside}?" if (inside / file).is_file() else "."
            raise UserError(f"{name} holds no {file}, so it is not an adapter that can be loaded{hint}")
    return folder


def read_adapter_config(folder: Path) -> dict:
    """The fields of adapter_config.json.

    Raises:
        UserError: not a JSON object.
    """
    try:
        config = json.loads((folder / ADAPTER_FILES[0]).read_text())
    except ValueError as error:
        raise UserError(f"{folder / ADAPTER_FILES[0]} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / ADAPTER_FILES[0]} holds no fields.")
    return config


def load_adapter(base, folder: Path):
    """Wrap `base` with the adapter of any PEFT type saved in `folder`.

    Returns:
        The PeftModel, in eval mode.

    Raises:
        UserError: not an adapter, damaged, or made for a model of other shapes.
    """
    import warnings

    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*Found missing adapter keys", category=UserWarning)
            model = PeftModel.from_pretrained(base, str(folder))
            # from_pretrained says nothing of weights without a place: those of a deeper model, for example.
            unexpected = model.load_adapter(str(folder), "default").unexpected_keys
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # load_state_dict lists every tensor below a heading
        reason = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
        raise UserError(f"the adapter in {folder} does not load on {base.name_or_path}: {reason[:300]}") from error
    if unexpected:
        raise UserError(
            f"the adapter in {folder} has {len(unexpected)} weights that {base.name_or_path} has no place for, such as "
            f"{min(unexpected)}."
        )
    return model.eval()
