"""What is refused of a command's settings before the heavy imports, and what is not."""

import json
import re

import pytest

from peft_onelayer.runs.early import check_source
from peft_onelayer.tasks.user import load_dataset_task

REWARD = "def {}(prompts, completions, **kwargs): return [0.0 for _ in completions]\n"


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "early_lib.py").write_text(REWARD.format("score"))
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "p"}) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "early_reward.py"


@pytest.mark.parametrize(
    "score",
    [
        "from early_lib import score\n",
        "from early_lib import *\n",
        "def _make(): return lambda prompts, completions, **kwargs: [0.0 for _ in completions]\nscore = _make()\n",
    ],
)
def test_a_reward_that_the_task_takes_is_let_through(file, score):
    file.write_text(score + "def helper(x): return x\n")
    data = str(file.parent / "data.jsonl")
    check_source(None, data, f"{file}:score")
    load_dataset_task(data, f"{file}:score")


@pytest.mark.parametrize(
    ("text", "said"), [(REWARD.format("helper"), "it has helper"), ("from early_lib import other\n", "it has none")]
)
def test_a_reward_that_is_not_there_is_refused(file, text, said):
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file} has no function 'score'; {said}")):
        check_source(None, str(file.parent / "data.jsonl"), f"{file}:score")
