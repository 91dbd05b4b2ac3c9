"""Bytes of a weight sync after each step: of everything, of the trained block, and of the block's changed entries.

    python examples/benchmarks/sync_bytes.py MODEL [--layer 15] [--learning-rate 1e-5] [--steps 8] [--prompts 4]

GRPO on one block in bfloat16 with float32 masters, 8 completions a prompt, on `examples/evidence/sums.py`, AdamW at a
constant rate. After each step the policy is sent to a receiver in bfloat16 that keeps what it is sent, which ends with
the policy's weights bit for bit. "changed" is the share of the block's entries that have another value in bfloat16
than one step before. An entry takes 6 bytes, its position and its value; with both forms to choose from, a tensor is
sent in the shorter one.
"""

import argparse
import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import row
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import scored_positions, shared_prompts, use_float32_units
from peft_onelayer.rl.layer_sync import LayerSync
from peft_onelayer.rl.policy_weights import PolicyWeights, digest

GROUP, ITEM = 8, 2


class Receiver:
    """Keeps the tensors that can change, in bfloat16."""

    name = "the receiver"
    takes_entries = True

    def __init__(self, weights: PolicyWeights, takes_tensors: bool) -> None:
        self.takes_tensors = takes_tensors
        self.held = {name: torch.zeros(weights.shape(name), dtype=torch.bfloat16) for name in weights.changing}

    def names(self) -> list[str]:
        return list(self.held)

    def digests(self, names: Any) -> dict[str, list[str]]:
        return {name: [digest([self.held[name]])] for name in names}

    def dtype(self, name: str, of_base: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def send_tensors(self, manifest: Any, tensors: Any) -> None:
        for name, tensor in tensors:
            if name in self.held:
                self.held[name].copy_(tensor)

    def send_entries(self, entries: Any) -> None:
        for entry in entries:
            if entry.name in self.held:
                self.held[entry.name].view(-1)[entry.indices.long()] = entry.values


class Syncs(TrainerCallback):
    """Sends the policy after every step, in each form."""

    def __init__(self) -> None:
        # Of each step: changed entries; bytes of the block, of entries, of the shorter.
        self.rows: list[tuple[int, ...]] = []

    def begin(self, model: Any) -> None:
        weights = PolicyWeights(model)
        self.everything = ITEM * sum(torch.Size(weights.shape(name)).numel() for name in weights.names)
        self.forms = [
            LayerSync(model, Receiver(weights, takes_tensors=True), changed_only=False),
            LayerSync(model, Receiver(weights, takes_tensors=False), changed_only=True),
            LayerSync(model, Receiver(weights, takes_tensors=True), changed_only=True),
        ]
        for form in self.forms:
            form.push()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for form in self.forms:
            form.push()
        assert all(form.pushes[-1].why != "digest" for form in self.forms)
        last = [form.pushes[-1] for form in self.forms]
        self.rows.append((last[1].entries, *(push.nbytes for push in last)))


def task() -> Any:
    path = Path(__file__).parents[1] / "evidence" / "sums.py"
    spec = importlib.util.spec_from_file_location("sums", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def times(a: int, b: int) -> str:
    return f"{a / b:,.0f} x" if b else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    use_float32_units()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sums, syncs = task(), Syncs()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16),
            reward_funcs=sums.first_number_reward,
            args=GRPOConfig(
                scratch,
                max_steps=given.steps,
                per_device_train_batch_size=given.prompts * GROUP,
                num_generations=GROUP,
                max_completion_length=sums.MAX_COMPLETION_TOKENS,
                learning_rate=given.learning_rate,
                lr_scheduler_type="constant",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list(sums.rows("train", given.prompts * given.steps, 0)),
            processing_class=AutoTokenizer.from_pretrained(given.model),
            peft_config=SingleLayerConfig(layer=given.layer, task_type="CAUSAL_LM"),
            callbacks=[syncs],
        )
        trainer.remove_callback(PrinterCallback)
        shared_prompts(trainer)
        scored_positions(trainer)
        syncs.begin(trainer.model)
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    block = syncs.rows[0][1]
    print(f"learning rate {given.learning_rate:g}, block {given.layer}, everything {syncs.everything:,} bytes a step")
    print("step   changed        block      entries   the shorter   (bytes)   everything / the shorter")
    for step, (entries, whole, parts, shorter) in enumerate(syncs.rows, 1):
        ratio = times(syncs.everything, shorter)
        print(f"{step:4} {entries * ITEM / block:8.2%} {whole:12,} {parts:12,} {shorter:13,} {ratio:>26}")
    total, count = [sum(column) for column in zip(*syncs.rows, strict=True)], len(syncs.rows)
    print(
        f"mean {total[0] / count * ITEM / block:8.2%} {total[1] // count:12,} {total[2] // count:12,} "
        f"{total[3] // count:13,} {times(syncs.everything * count, total[3]):>26}"
    )
    row(
        "sync of the block / of everything, bytes", block / syncs.everything, 1 / trainer.model.config.num_hidden_layers
    )
    row("sync of changed entries / of everything, bytes", total[3] / count / syncs.everything)
    print(
        f"everything / block {syncs.everything / block:.1f} x; "
        f"mean reward of the steps {sum(rewards) / len(rewards):.2f}"
    )


if __name__ == "__main__":
    main()
