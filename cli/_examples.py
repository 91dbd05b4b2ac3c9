"""Two examples or more for the help of every command that has none of its own."""

from __future__ import annotations

EXAMPLES = {
    "demo": """
  onelayer demo                                       rank, train, measure and reload, in ./onelayer-demo
  onelayer demo --task sort --layer 5 --out sorted    another toy task, on a block of your choice""",
    "probe": """
  onelayer probe Qwen/Qwen3-1.7B-Base --task gsm8k --out ranking.json   a race of short runs
  onelayer probe Qwen/Qwen3-1.7B-Base --method prior                    by depth alone, free""",
    "train": """
  onelayer train Qwen/Qwen3-1.7B-Base --task gsm8k --out run              the best block, ranked first
  onelayer train Qwen/Qwen3-1.7B-Base --task my_task.py --layer 14 --out run   your own task, block 14
  onelayer train --resume --out run                                       go on with an interrupted run""",
    "recipes": """
  onelayer recipes                            the list
  onelayer recipes qwen3-1.7b-numina:paper    one of them, as a file for train --config""",
    "eval": """
  onelayer eval Qwen/Qwen3-1.7B-Base --adapter run --task gsm8k --out run/eval.json
  onelayer eval run --task gsm8k --problems 64 --show 3    the adapter names its base""",
    "sweep": """
  onelayer sweep Qwen/Qwen3-1.7B-Base --task gsm8k --layers 0,7,14,21 --out sweep
  onelayer sweep Qwen/Qwen3-1.7B-Base --task gsm8k --seeds 0,1 --engine slurm --slurm gpus_per_node=1""",
    "generate": """
  onelayer generate run --prompt "What is 12 x 12?"    the adapter beside its base
  onelayer generate Qwen/Qwen3-1.7B-Base run other-run --temperature 0.7    a conversation, line by line""",
    "inspect": """
  onelayer inspect run
  onelayer inspect me/qwen3-gsm8k --base Qwen/Qwen3-1.7B-Base    also how much changed""",
    "entropy": """
  onelayer entropy Qwen/Qwen3-1.7B-Base --layer 14 --task gsm8k    at the start of a run
  onelayer entropy Qwen/Qwen3-1.7B-Base --adapter run --task gsm8k --json    at its end""",
    "vote": """
  onelayer vote run-a run-b run-c --task gsm8k --out vote.json
  onelayer vote run-a run-b --task gsm8k --samples 2 --problems 64""",
    "merge": """
  onelayer merge Qwen/Qwen3-1.7B-Base run merged
  onelayer merge Qwen/Qwen3-1.7B-Base me/qwen3-gsm8k merged""",
    "export": """
  onelayer export run plain --format peft    for plain PEFT, without this package
  onelayer export run small --format sparse""",
    "report": """
  onelayer report run                                  bars and figures in the terminal
  onelayer report run-a run-b sweep --html report.html    a page, without network""",
    "card": """
  onelayer card run --license apache-2.0
  onelayer card my-adapter --base-model Qwen/Qwen3-1.7B-Base    one that save_pretrained wrote""",
    "push": """
  onelayer push run me/qwen3-gsm8k --dry-run    what would go up, and the card
  onelayer push run me/qwen3-gsm8k --private""",
    "pull": """
  onelayer pull me/qwen3-gsm8k adapter
  onelayer pull me/qwen3-gsm8k adapter --revision v1""",
    "tasks": """
  onelayer tasks
  onelayer tasks --json""",
    "algorithms": """
  onelayer algorithms
  onelayer algorithms dr_grpo    the loss settings of one""",
    "doctor": """
  onelayer doctor
  onelayer doctor runs --json    also the runs in another folder""",
    "search": """
  onelayer search --base Qwen/Qwen3-1.7B-Base
  onelayer search --task gsm8k --layer 14""",
}
