"""Opens the base model a command was given, and says in one line what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

from ._errors import UserError
from ._output import status


def load_causal_lm(name: str):
    """Load model and tokenizer from a folder or from the Hub.

    Returns:
        The model in the dtype of its checkpoint, in eval mode, and its tokenizer.

    Raises:
        UserError: not there, not a causal language model, incomplete, or without a tokenizer.
    """
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
            config = AutoConfig.from_pretrained(name)
            causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
            accepted = (causal,) if isinstance(causal, str) else tuple(causal or ())
            architectures = config.architectures or accepted
            if not set(architectures) & set(accepted):
                raise UserError(
                    f"{name} is a {', '.join(architectures) or config.model_type}, not a causal language model "
                    f"({config.model_type} {'has ' + accepted[0] if accepted else 'has none'})."
                )
            model, info = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
            if info["missing_keys"]:
                raise UserError(
                    f"{name} lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}."
                )
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = f"the model in {name}" if is_path else f"{name}, neither a folder here nor found on the Hub"
        raise UserError(f"cannot load {what}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        logging.enable_progress_bar()
    return model, tokenizer
