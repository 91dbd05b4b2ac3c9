"""Hooks on the model of a trainer that are there while it trains."""

from __future__ import annotations

from typing import Any, Self

from peft import PeftModel
from transformers import Trainer, TrainerCallback

from peft_onelayer.tuner.prompts import decoder_of


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

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> Self:
        """For a trainer's model, and the reference beside a model that trains in full; already a callback."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = cls(model.get_base_model() if isinstance(model, PeftModel) else model)
        if (reference := getattr(trainer, "ref_model", None)) is not None:
            found.reference = cls(trainer.accelerator.unwrap_model(reference))
        trainer.add_callback(found)  # one, since transformers warns of a second of a class
        return found

    def hooks(self, args: Any) -> list[Any]:
        """Put the hooks in place, and return their handles.

        Args:
            args: the trainer's.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()
        if self.decoder is not None and self.decoder is not self.model:
            self._handles = self.hooks(args)
        if self.reference is not None:
            self.reference.on_train_begin(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.reference is not None:
            self.reference.remove()
