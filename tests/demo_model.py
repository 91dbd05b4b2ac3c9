"""The embedded demo model and its tokenizer, for tests that need a model which knows something."""

from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer


def load():
    path = str(files("peft_onelayer") / "demo_model")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
