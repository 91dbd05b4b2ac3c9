"""Runs one cell of the matrix: trains two steps and checks every weight, or finds the reason why TRL will not."""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from torch import nn
from trl_cells import DATA, LAYER, LAYERS, Cell
from tuner.helpers import base_weights, masters, move, same, wrap

import peft_onelayer
from models import build
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner.graph_cut import installed_graph_cuts

WORKS = "works"
WAYS = ("peft_config", "wrapped")
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 2,
    "learning_rate": 1e-2,  # large enough to see both steps in every tensor
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
}


def classifier(dtype: torch.dtype) -> nn.Module:
    config = build(num_layers=LAYERS).config
    config.num_labels = 1
    torch.manual_seed(0)
    return transformers.Qwen3ForSequenceClassification(config).to(dtype)


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what must not change: everything but the adapters and the copy of a head that PEFT trains."""
    weights = {name.replace(".original_module", ""): weight for name, weight in base_weights(model).items()}
    return {name: weight for name, weight in weights.items() if ".modules_to_save." not in name}


def make(cell: Cell, model, tokenizer, folder: Path, dtype: torch.dtype, **options) -> Callable[..., Any]:
    """The trainer of a cell, but for a `peft_config`."""
    trainer = cell.trainer if cell.mixin is None else type("Trainer", (cell.mixin, cell.trainer), {})
    return functools.partial(
        trainer,
        model=model,
        args=cell.config(**{**COMMON, "output_dir": str(folder / "out"), **cell.options, **options}),
        train_dataset=Dataset.from_dict(DATA[cell.data]),
        processing_class=tokenizer,
        **cell.extra(tokenizer, folder / "extra", dtype),
    )


def run(
    cell: Cell,
    variant: dict[str, Any],
    way: str,
    dtype: torch.dtype,
    tokenizer,
    folder: Path,
    examine: Callable[[Any], None] = lambda trainer: None,
    prepare: Callable[[Any], Any] = lambda trainer: None,
    **options,
) -> str:
    """Returns `WORKS` after checking the weights, or the reason for which TRL (or our extension) refused.

    `prepare` gets the trainer before it trains, `examine` for further checks; `options` are added to those of the cell.
    """
    model = classifier(dtype) if cell.head else build(num_layers=LAYERS, dtype=dtype)
    task = {"layer": LAYER, "task_type": "SEQ_CLS" if cell.head else "CAUSAL_LM"}
    before = frozen(model)
    start = {name: w.float() for name, w in before.items() if name.startswith(f"model.layers.{LAYER}.")}
    arguments: dict[str, Any] = {}
    if way == "wrapped":
        model = wrap(model, **task)
        start = move(model)  # an adapter trained before: a reference is this one, not the base
    else:
        arguments["peft_config"] = SingleLayerConfig(**task)
        if cell.by_name:
            model.save_pretrained(folder / "student")
            tokenizer.save_pretrained(folder / "student")
            model = str(folder / "student")
    try:
        trainer = make(cell, model, tokenizer, folder, dtype, **variant, **options)(**arguments)
        prepare(trainer)
        trainer.train()
    except Exception as error:
        if cell.by_name and way == "wrapped" and isinstance(error, TypeError):
            wanted = inspect.signature(cell.trainer).parameters["model"].annotation
            return f"takes a name only: `model: {wanted.__name__}`"
        if not _is_refusal(error):
            raise
        return reason(error)
    check(trainer, cell, way, before, start)
    examine(trainer)
    return WORKS


def check(trainer, cell: Cell, way: str, before: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> None:
    """The block changed, in float32 and finite; nothing else did, and nothing else trains; the reference is `start`."""
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    tuned = masters(model)
    if cell.options.get("cast_lm_head_to_fp32"):
        before["lm_head.weight"] = before["lm_head.weight"].float()
    assert same(frozen(model), before)
    assert trainer.args.gradient_checkpointing and len(installed_graph_cuts(model)) == 1  # TRL's default
    assert tuned.keys() == start.keys() and len(tuned) == 11
    assert [name for name, p in tuned.items() if torch.equal(p, start[name])] == []
    assert {p.dtype for p in tuned.values()} == {torch.float32} and all(p.isfinite().all() for p in tuned.values())
    head = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    assert len(head) == cell.head and not any(torch.equal(p, before["score.weight"]) for p in head)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in [*tuned.values(), *head]}

    reference = masters(model, "ref")
    if cell.follower:
        assert not any(torch.equal(p, start[name]) for name, p in masters(model, cell.follower).items())
    elif reference:
        assert way == "wrapped" and same(_detached(reference), start)
    elif way == "wrapped" and getattr(trainer, "ref_model", None) is not None:  # a whole copy of the model
        assert same(_detached(masters(trainer.ref_model)), start)
    else:
        assert way == "peft_config" or cell.zero_at_first is None
    if cell.zero_at_first:
        logged = [entry[cell.zero_at_first] for entry in trainer.state.log_history if cell.zero_at_first in entry]
        assert abs(logged[0]) < 1e-6 < abs(logged[1])


def _detached(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in parameters.items()}


def _is_refusal(error: Exception) -> bool:
    """Whether TRL raised it, or an extension of ours; a failure anywhere else is a defect."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = (Path(trl.__file__).parent, Path(peft_onelayer.__file__).parent / "rl")
    no_such_argument = isinstance(error, TypeError) and "unexpected keyword argument 'peft_config'" in str(error)
    refused = isinstance(error, (ValueError, NotImplementedError, TypeError, ImportError))
    return no_such_argument or (refused and any(Path(where).is_relative_to(folder) for folder in ours))


def reason(error: Exception) -> str:
    """The first sentence of the message, as a cell of a table."""
    sentence = re.split(r"(?<=\.)\s", str(error).replace("\n", " "), maxsplit=1)[0].rstrip(".")
    return f"{type(error).__name__}: {sentence}".replace("|", "\\|")
