"""The embedded demo model and its tokenizer, for tests that need a model which knows something."""

from importlib.resources import files

from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load():
    path = str(files("peft_onelayer") / "demo_model")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def save_with_template(folder, template, *, skips_line_ends=True):
    """Write it to `folder` with a chat template; its tokenizer has no line ends, and may skip those of a template."""
    model, tokenizer = load()
    tokenizer.chat_template = template
    if skips_line_ends:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
