"""Make the model folder that the evidence was measured on from a 4-bit GGUF file, dequantized to bfloat16.

    pip install gguf
    python examples/evidence/from_gguf.py model.gguf ~/.cache/onelayer-models/smollm2-135m

README.md beside this says which files were taken, with their SHA-256.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, out: Path) -> None:
    """Write `out` as `save_pretrained` does: bfloat16 weights, configuration and tokenizer."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    weights = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    fields = {name: value for name, value in weights.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(weights.config)(**fields), dtype=torch.bfloat16)
    model.load_state_dict(weights.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
