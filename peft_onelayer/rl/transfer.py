"""AsyncGRPO's weight transfer, of the trained block alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peft_onelayer.seams import check

from .engines import Engine, Manifest, NamedTensors, Server
from .layer_sync import LayerSync


class LayerTransfer:
    """Stands in for the `weight_transfer` of AsyncGRPO and AsyncDistillation, with the calls of TRL's
    `WeightTransferProtocol`.

    Args:
        transfer: TRL's `WeightTransferClient`.
        sync: sends in its place.
    """

    def __init__(self, transfer: Any, sync: LayerSync) -> None:
        self.transfer, self.sync = transfer, sync

    @staticmethod
    def engine(transfer: Any) -> Engine:
        """The server that TRL's `WeightTransferClient` sends to."""
        check(__name__)
        announced = transfer._weight_update_info

        def send(manifest: Manifest, tensors: NamedTensors) -> None:
            transfer._weight_update_info = {**announced, **manifest}
            transfer.send_weights(tensors)

        return Server(transfer.vllm.server_url, send, lambda: transfer.model_update_group)

    def init_weight_transfer(self) -> None:
        self.transfer.init_weight_transfer()

    def pause(self) -> None:
        self.transfer.pause()

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.sync.push()  # which reads the policy's weights itself, also while TRL has them merged

    def resume(self) -> None:
        self.transfer.resume()

    def destroy(self) -> None:
        self.transfer.destroy()
