"""What is on the model of a trainer while it trains, and not a moment longer."""

from __future__ import annotations

import functools
from typing import Any, Protocol, Self

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from peft_onelayer.tuner.prompts import decoder_of


class Removable(Protocol):
    """A callback that takes away what it put on a model."""

    def remove(self) -> None: ...


def while_training(trainer: Trainer, callback: Removable) -> None:
    """Add a callback to a trainer that removes itself when training ends, be it by an exception or Ctrl-C.

    transformers tells its callbacks of the end of training only where no exception ends it. What another trainer has
    put on the model, inside whose training this one trains, is away meanwhile.

    Raises:
        ValueError: the trainer has a callback of this class.
    """
    if any(type(other) is type(callback) for other in trainer.callback_handler.callbacks):
        raise ValueError(f"the trainer has a {type(callback).__name__} already; call this once for each trainer.")
    train = trainer.train

    @functools.wraps(train)
    def train_and_remove(*args: Any, **kwargs: Any) -> Any:
        others = _on(trainer.accelerator.unwrap_model(trainer.model))
        for other in others:
            other.remove()
        try:
            return train(*args, **kwargs)
        finally:
            callback.remove()
            for other in others:
                other.put_back()

    trainer.train = train_and_remove
    trainer.add_callback(callback)


class HooksWhileTraining(TrainerCallback):
    """Has `hooks` of its kind on a model and on its decoder from the beginning of training to its end.

    Attributes:
        model: not wrapped by PEFT.
        decoder: its own; None where it has none.
        reference: the same for a model that stands beside the trained one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder: Any = decoder_of(model)
        self.reference: Self | None = None
        self._handles: list[Any] = []
        self._args: Any = None  # the trainer's, once it trains

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> Self:
        """For a trainer's model, and the reference beside a model that trains in full; already a callback."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = cls(model.get_base_model() if isinstance(model, PeftModel) else model)
        if (reference := getattr(trainer, "ref_model", None)) is not None:
            found.reference = cls(trainer.accelerator.unwrap_model(reference))
        while_training(trainer, found)  # one for both models
        return found

    def hooks(self, args: Any) -> list[Any]:
        """Put the hooks in place, and return their handles.

        Args:
            args: the trainer's.
        """
        raise NotImplementedError  # every kind has its own

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._args = args
        self.put_back()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def put_back(self) -> None:
        """Put the hooks in place again, while a trainer trains."""
        self.remove()
        if self.decoder is not None:
            self._handles = self.hooks(self._args)
        if self.reference is not None:
            self.reference.on_train_begin(self._args, None, None)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.reference is not None:
            self.reference.remove()


def _on(model: nn.Module) -> list[HooksWhileTraining]:
    """Those that have hooks on a model."""
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, HooksWhileTraining)))
