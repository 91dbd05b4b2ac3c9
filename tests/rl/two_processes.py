"""Run by torchrun on two processes: what GiGPO makes of groups that lie on both, and the top-entropy loss of halves.

Usage: two_processes.py FOLDER. Each process writes FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from corridor import Babble
from test_entropy import make as make_entropy
from test_entropy import make_inputs
from test_gigpo_trainer import GRPO, PLAIN, GiGPO, make
from tuner.helpers import masters

ROWS = 6  # a process; three groups of four, the second of them on both


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for kind, options in ((GiGPO, {}), (GRPO, PLAIN)):
        trainer = make(folder / "run", kind, per_device_train_batch_size=ROWS, **options)
        rank = trainer.accelerator.process_index
        trainer.model.generate = Babble(rank)
        rows = [{"prompt": [{"role": "user", "content": "go"}], "start": (rank * ROWS + i) // 4} for i in range(ROWS)]
        trainer._generate_and_score_completions(rows)
        metrics = {name: value for name, value in trainer._metrics["train"].items() if "gigpo" in name}
        found[kind.__name__] = (*trainer.recorded[0], metrics)
        if kind is GiGPO:
            trainer.train()
            found["weights"] = {name: p.detach().clone() for name, p in masters(trainer.model).items()}
    for loss_type in ("grpo", "bnpo", "dapo"):
        options = {"loss_type": loss_type, "top_entropy_quantile": 0.2, "per_device_train_batch_size": 2}
        trainer = make_entropy(folder / "run", **options)
        inputs = make_inputs(trainer.model)
        half = slice(2 * rank, 2 * rank + 2)
        found[loss_type] = trainer._compute_loss(
            trainer.model, {name: t if t.dim() == 0 else t[half] for name, t in inputs.items()}
        ).item()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
