"""Everything that has to hold and to be measured on one GPU, in one command of at most 8 minutes, from random weights.

    python examples/benchmarks/gpu.py [--minutes 8] [--out FILE.jsonl] [--small | --tiny] [--only PART ...]

Every result is a row of JSON in FILE and on stdout as soon as it is there. A part that fails, or for which no time is
left, is a row too, and the next part begins. What is worth most comes first: the checks (training of one block against
plain freezing bit for bit, merging, files, threads), GRPO through TRL, and the commands on the embedded model; then the
costs of a training step, of decoding and of a GRPO step, and how they grow. At the end comes a table, which is also
written beside FILE as .md. Nothing is downloaded. --only takes parts by name, such as those for which a run before had
no time left.

The model of the measurements has Qwen3-1.7B's shape in bfloat16. Without a GPU of 60 GB it has 24 blocks of width 512
(--small). --tiny is for the tests: everything once, on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
    os.environ[name] = value  # before the libraries are imported

import gpu_models as models
import torch
import transformers
from gpu_checks import Checks
from gpu_commands import Commands
from gpu_costs import Costs
from gpu_rows import Rows, environment, markdown

PARTS = (
    "checks",
    "GRPO checks",
    "commands",
    "machine",
    "training steps",
    "decoding",
    "GRPO steps",
    "training steps without checkpointing",
    "GRPO steps with a reference",
    "compiled",
    "growth",
)
LARGE = 60e9  # bytes of memory for Qwen3-1.7B's shape with float32 masters and AdamW's state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="24 blocks of width 512")
    size.add_argument("--tiny", action="store_true", help="4 blocks of width 32, everything once")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    gc.collect()
    gc.freeze()  # what was imported is looked at no more, so that collecting between the parts is quick
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = Rows(given.out, 60 * given.minutes)
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > LARGE
    sizes = models.TINY if given.tiny else models.QWEN3_1_7B if large and not given.small else models.SMALL
    checked = models.CHECKED if device.type == "cuda" else models.CHECKED_TINY
    rows.write("environment", "machine", **environment(device), model=sizes.name, shape=sizes.shape)
    try:
        measure(rows, device, sizes, checked, given.only)
    finally:
        failed = sum(row.get("ok") is False for row in rows.rows)
        rows.write("end", "all", failed=failed, rows=len(rows.rows), seconds_in_all=round(rows.seconds - rows.left()))
        table = markdown(rows.rows)
        given.out.with_suffix(".md").write_text(table, encoding="utf-8")
        print(table, flush=True)


def measure(
    rows: Rows, device: torch.device, sizes: models.Sizes, checked: dict[str, int], only: Collection[str]
) -> None:
    """The parts of `only`, what is worth most first."""
    tiny = sizes.name == models.TINY.name
    commands = Commands(rows, few=tiny) if "commands" in only else None
    base = models.build(sizes.shape, torch.bfloat16, device)
    checks, costs = Checks(rows, device, checked), Costs(rows, device, sizes, base)

    def grpo_checks() -> None:
        from gpu_trl import GRPOChecks  # in the part, so that what TRL lacks on the machine fails the part alone

        GRPOChecks(rows, device, checked).all()

    def grpo_steps(beta: float) -> None:
        from gpu_trl import GRPOCosts

        GRPOCosts(rows, device, sizes, base).all(beta)

    def finish_commands() -> None:
        if commands is not None:
            commands.finish(min(120, rows.left() - (60 if tiny else 0.55 * rows.seconds)))

    parts: dict[str, Callable[[], None]] = {
        "checks": lambda: checks.all(base),
        "GRPO checks": grpo_checks,
        "commands": finish_commands,
        "machine": costs.machine,
        "training steps": lambda: costs.steps(checkpointing=True),
        "decoding": costs.decoding,
        "GRPO steps": lambda: grpo_steps(0.0),
        "training steps without checkpointing": lambda: costs.steps(checkpointing=False),
        "GRPO steps with a reference": lambda: grpo_steps(0.04),
        "compiled": checks.compiled,
        "growth": costs.growth,
    }
    for name in PARTS:
        if name in only:
            with rows.failures_as_rows("parts", name):
                parts[name]()


if __name__ == "__main__":
    main()
