"""`onelayer demo`: the whole job on the embedded model, in under three minutes on two cores."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._errors import user_error
from ._options import Json, Seed, TrustRemoteCode
from ._output import TerminalProgress, print_line, print_next, print_table, status

if TYPE_CHECKING:
    from peft_onelayer.runs.demo import DemoRecord


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the figures and the plots.")] = Path(
        "onelayer-demo"
    ),
    seed: Seed = 0,
    task: Annotated[str, typer.Option(help="Task to train on: arithmetic or sort.")] = "arithmetic",
    layer: Annotated[
        str, typer.Option(help="Blocks to train (5, -1, 3,5, 3-5, middle, mid-5), or auto to rank the blocks first.")
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="GRPO steps, each of 24 prompts x 8 completions.")] = 150,
    model: Annotated[
        str | None, typer.Option(help="Another base model for the task: a folder or a Hub id.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Watch one block get chosen, trained with GRPO and saved as an adapter (under 3 minutes on 2 cores)."""
    from peft_onelayer.runs.early import check_demo

    with user_error(ValueError, OSError):
        check_demo(out, task, layer, model)
    with status("loading ..."):
        from peft_onelayer.runs.demo import run_demo

    command = ["onelayer", "demo", "--seed", str(seed), "--task", task, "--layer", layer, "--steps", str(steps)]
    command += ["--model", model] if model else []
    command += ["--trust-remote-code"] if trust_remote_code else []
    with user_error(ValueError, OSError):
        record = run_demo(
            out,
            seed=seed,
            task=task,
            layer=layer,
            steps=steps,
            model=model,
            trust_remote_code=trust_remote_code,
            command=shlex.join(command),
            progress=TerminalProgress(),
        )
    if as_json:
        print(record.to_json(), end="")
    else:
        _print_summary(record, out)


def _print_summary(record: DemoRecord, out: Path) -> None:
    print_table(
        f"{record.task}, {record.problems} held-out problems",
        ["", "base", "adapter", "difference (points)", "standard error"],
        [
            [
                f"{mode} accuracy",
                f"{100 * r['base']:.1f} %",
                f"{100 * r['adapter']:.1f} %",
                f"{100 * r['difference']:+.1f}",
                f"{100 * r['standard_error']:.1f}",
            ]
            for mode, r in record.results.items()
        ],
    )
    share = record.trained_parameters / record.parameters
    print_table(
        f"block {', '.join(map(str, record.layers))} of {record.num_layers}",
        ["", ""],
        [
            ["trained parameters", f"{record.trained_parameters:,} of {record.parameters:,} ({share:.1%})"],
            ["adapter", f"{record.adapter_bytes:,} bytes"],
            ["reloaded in a fresh process", "bit-equal"],
            ["time", f"{record.seconds:.0f} s"],
        ],
    )
    print_line(record.verdict)
    print_line(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))
    adapter = str(out / "adapter")
    print_next(
        ["onelayer", "inspect", adapter],
        ["onelayer", "analyze", record.model, adapter],
        ["onelayer", "train", record.model, "--task", "my_task.py", "--out", "run"],
    )
