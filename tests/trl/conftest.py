import os

import pytest
import trl_table
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from trl_cells import CELLS, SERVER_CELLS


@pytest.fixture
def chat_tokenizer(tokenizer):
    """The shared vocabulary with a chat template, and bytes as symbols, which GOLD asks for."""
    vocabulary = {"Ġ" if token == " " else token: i for token, i in tokenizer.get_vocab().items()}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokenizer.special_tokens_map)
    # AsyncGRPO parses what the model answered, and knows how only for well-known chat templates.
    made.response_template = {"defaults": {"role": "assistant"}, "fields": {"content": {"content": "text"}}}
    return made


@pytest.fixture(scope="session")
def record():
    """Compares an outcome with the table in docs/trainers.md, or with TRL_TABLE=write collects all of them and writes it."""
    writing, outcomes = os.environ.get("TRL_TABLE") == "write", {}

    def record(cell, variant, way, outcome):
        assert "Traceback" not in outcome, outcome
        if writing:
            assert outcomes.setdefault((cell.title, cell.label(variant), way), outcome) == outcome
        else:
            assert outcome == trl_table.published(cell, variant, way)

    yield record
    if writing:
        trl_table.write([*CELLS, *SERVER_CELLS], outcomes)
