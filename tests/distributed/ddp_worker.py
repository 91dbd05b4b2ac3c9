"""Run on two processes: training under DistributedDataParallel. The first process saves what it found."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distributed.launch import end
from distributed.runs import copies, fresh, gradients, train
from distributed.test_ddp import CASES, OPTIMIZERS


def lower_block_kept_no_graph(model) -> list[bool]:
    """Whether each forward pass of the block below the trained one left nothing to go back through."""
    seen: list[bool] = []
    model.get_decoder().layers[1].register_forward_hook(lambda m, a, out: seen.append(not out.requires_grad))
    return seen


def outcome(checkpointing: str, optimizer: str, options: dict, accumulate: int) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = fresh(checkpointing=checkpointing)
    cut = lower_block_kept_no_graph(model.get_base_model())
    ddp = DistributedDataParallel(model, **options)
    optimizer_class, settings = OPTIMIZERS[optimizer]
    losses = train(model, optimizer_class, forward=ddp, rank=rank, world=world, accumulate=accumulate, **settings)
    total = torch.stack(losses)
    dist.all_reduce(total)
    everywhere = [None] * world
    dist.all_gather_object(everywhere, copies(model))
    return {"losses": total / world, "weights": everywhere, "gradients": gradients(model), "cut": cut}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {name: outcome(*case) for name, case in CASES.items()}
    if dist.get_rank() == 0:
        torch.save(results, folder / "ddp.pt")
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
