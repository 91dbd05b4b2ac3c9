"""PEFT's toy model with a ModuleList of blocks. Imported after PEFT's tests were fetched."""

import torch
from torch import nn

from .source import load


class Toy(load("test_custom_models").DeepMLP):  # type: ignore[misc]
    """PEFT's DeepMLP with fewer blocks and a forward: its own calls `X.float(X)`, an error, because PEFT never runs it.

    PEFT's blocks cast to float32 themselves, so their parts are called here, in the dtype of the model, and with a
    residual connection, or the first block would hardly reach the output. Starts in eval mode, as transformers'
    `from_pretrained` does.
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias=bias, num_hidden_layers=4)
        self.eval()

    def forward(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803  PEFT's name
        hidden = X.to(self.out.weight.dtype)
        for block in self.layers:
            hidden = hidden + block.lin1(block.drop(block.relu(block.lin0(hidden))))
        return nn.functional.log_softmax(self.out(hidden), dim=-1)
