"""Blocks with a learning rate of their own in full training: the boost of arXiv 2607.01232.

The optimizer's parameter groups are split when the trainer has made it, before its first step, so that schedules and
checkpoints hold the rates of both, with any optimizer and any trainer built on transformers' `Trainer`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from peft_onelayer.layers import LAYER_FORMS, check_layers
from peft_onelayer.tuner import find_decoder_stack

BOOST = "boost"  # in a parameter group: the factor


class BoostMixin:
    """In front of a trainer's class; see `boosted`."""

    boosted_layers: ClassVar[list[int]] = []
    boost_factor: ClassVar[float] = 1.0
    optimizer: Any
    model: Any
    accelerator: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with groups of their own for the boosted blocks."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if not any(BOOST in group for group in optimizer.param_groups):
            model: nn.Module = self.accelerator.unwrap_model(self.model)
            blocks = find_decoder_stack(model).blocks
            own = {id(p) for index in self.boosted_layers for p in blocks[index].parameters()}
            optimizer.param_groups[:] = split_groups(optimizer.param_groups, own, self.boost_factor)
        return optimizer


def split_groups(groups: list[dict[str, Any]], boosted: set[int], factor: float) -> list[dict[str, Any]]:
    """The parameter groups with the boosted parameters, by their identities, in groups of `factor` times the rate.

    Raises:
        RuntimeError: the optimizer holds none of them.
    """
    split = []
    for group in groups:
        for wanted in (False, True):
            if members := [p for p in group["params"] if (id(p) in boosted) == wanted]:
                scale = factor if wanted else 1.0
                split.append({**group, "params": members, "lr": group["lr"] * scale, BOOST: scale})
    if not any(group[BOOST] == factor for group in split):
        raise RuntimeError("the optimizer holds no parameter of the boosted blocks as they are in the model.")
    return split


def boosted(trainer_class: type[Any], layers: list[int], factor: float) -> type[Any]:
    """`trainer_class` with `factor` times the learning rate for the blocks `layers` of a model that trains in full."""
    fields = {"boosted_layers": layers, "boost_factor": factor}
    return type(trainer_class.__name__, (BoostMixin, trainer_class), fields)


def parse_boost(text: str) -> tuple[str, float]:
    """The blocks and the factor of "top-10@ranking.json:2.0".

    >>> parse_boost("8-13:2")
    ('8-13', 2.0)

    Raises:
        ValueError: another form, a factor that is not above 0, or blocks that are no such thing.
    """
    layers, _, factor = text.rpartition(":")
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if not layers or not 0 < value < float("inf"):
        raise ValueError(
            f"boost={text!r} is not BLOCKS:FACTOR, such as top-10@ranking.json:2.0; BLOCKS: {LAYER_FORMS}."
        )
    check_layers(layers)
    return layers, value
