"""What hidden states on disk save an offline trainer in its later epochs (`shared_prefix(trainer, cache_dir)`).

    python examples/benchmarks/prefix_cache.py [--epochs 3] [--rows 16] [--tokens 256] [--layers 12 20]

SFT of a Llama-like model of random float32 weights, 24 blocks of width 512, on random rows, with TRL's default of
checkpointing, once without the cache, once with an empty one, and once with the full one that this leaves. CPU seconds
of a whole training in one thread, and the cache's bytes. Needed are the multiplications of the blocks: with the cache
the blocks below the trained one run in the first epoch alone.
"""

import argparse
import random
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from bench import row
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_onelayer import SingleLayerConfig
from peft_onelayer.runs.models import without_progress_bars

BLOCKS, WIDTH, VOCABULARY = 24, 512, 1000


def seconds(layer: int, given: argparse.Namespace, scratch: Path, cache: Path | None) -> float:
    from peft_onelayer.rl import shared_prefix

    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": BLOCKS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=8, **shape))
    words = random.Random(0)
    rows = [{"input_ids": [words.randrange(10, VOCABULARY) for _ in range(given.tokens)]} for _ in range(given.rows)]
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(scratch),
            num_train_epochs=given.epochs,
            per_device_train_batch_size=4,
            max_length=given.tokens,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=SingleLayerConfig(layer=layer, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    shared_prefix(trainer, cache)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2", unk_token="0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("epochs", 3), ("rows", 16), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 20])
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(
        "block   no cache   first run   later run   first / none   needed   later / none   needed      bytes",
        flush=True,
    )
    for layer in given.layers:
        with tempfile.TemporaryDirectory() as folder, without_progress_bars():
            scratch, cache = Path(folder), Path(folder) / "cache"
            none, first, later = (seconds(layer, given, scratch / "out", way) for way in (None, cache, cache))
            held = sum(file.stat().st_size for file in cache.glob("*/*"))
        above = 3 * (BLOCKS - layer)  # forward, again behind a checkpoint, and back
        needed = [(layer / given.epochs + above) / (layer + above), above / (layer + above)]
        row(f"offline epochs with a new cache / without, block {layer}", first / none, needed[0])
        row(f"offline epochs with a full cache / without, block {layer}", later / none, needed[1])
        print(
            f"{layer:5} {none:8.1f} s {first:9.1f} s {later:9.1f} s {first / none:14.2f} {needed[0]:8.2f} "
            f"{later / none:14.2f} {needed[1]:8.2f} {held:10,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
