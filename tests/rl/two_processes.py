"""Run on two processes: what GiGPO makes of groups that lie on both, and the top-entropy loss of halves.

Usage: two_processes.py FOLDER. Each process writes FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from corridor import Babble
from distributed.launch import end
from test_entropy import make as make_entropy
from test_entropy import make_inputs
from test_gigpo_trainer import GRPO, PLAIN, GiGPO, make
from tuner.helpers import masters

ROWS = 6  # a process; three groups of four, the second of them on both


def advantages(folder: Path, kind: type, **options) -> tuple:
    """What a trainer of `kind` makes of the rows of this process: inputs, outputs, metrics; and the trainer."""
    trainer = make(folder / "run", kind, per_device_train_batch_size=ROWS, **options)
    rank = trainer.accelerator.process_index
    trainer.model.generate = Babble(rank)
    rows = [{"prompt": [{"role": "user", "content": "go"}], "start": (rank * ROWS + i) // 4} for i in range(ROWS)]
    trainer._generate_and_score_completions(rows)
    metrics = {name: value for name, value in trainer._metrics["train"].items() if "gigpo" in name}
    return (*trainer.recorded[0], metrics), trainer


def trained(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: p.detach().clone() for name, p in masters(trainer.model).items()}


def loss_of_half(folder: Path, loss_type: str) -> float:
    options = {"loss_type": loss_type, "top_entropy_quantile": 0.2, "per_device_train_batch_size": 2}
    trainer = make_entropy(folder / "run", **options)
    inputs, rank = make_inputs(trainer.model), trainer.accelerator.process_index
    half = slice(2 * rank, 2 * rank + 2)
    mine = {name: t if t.dim() == 0 else t[half] for name, t in inputs.items()}
    return trainer._compute_loss(trainer.model, mine).item()


def outcome(folder: Path) -> dict:
    found, trainer = advantages(folder, GiGPO)
    return {
        "GiGPO": found,
        "weights": trained(trainer),
        "GRPO": advantages(folder, GRPO, **PLAIN)[0],
        **{loss_type: loss_of_half(folder, loss_type) for loss_type in ("grpo", "bnpo", "dapo")},
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = outcome(folder)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
