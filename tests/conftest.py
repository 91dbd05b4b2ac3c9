import gc
import logging
import os

import pytest

gc.disable()  # nothing of what a session imports is garbage

# Matrices this small gain nothing from a second thread, and on a busy machine lose a factor of ten to it. Torch reads
# this when it is imported, here and in the processes that tests start; the process that only hands out the tests to
# others reads this file too, and they wait for it.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile all tests of the Hub are as one file: they share a process whose imports take seconds."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "tests/hub" if nodeid.startswith("tests/hub/") else super()._split_scope(nodeid)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def what_was_there_before():
    """Takes what is imported and kept by now out of the collector's sight: Trainer collects after every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def logged():
    """What reaches the root logger at the level of warnings, as it comes."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = found.append
    logging.getLogger().addHandler(handler)
    yield found
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def tokenizer():
    """One token per character, for the 64 ids of the tiny models."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456 "
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
