"""The command that `onelayer probe` prints trains exactly the run that the blocks were ranked for."""

import shlex

import pytest

from onelayer_cli.probe import train_command
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.runs import ProbeSettings

RANKING = LayerRanking(
    *("m", None, 12, "race", [0.1] * 12, [0.1] * 12, [7, *range(7), *range(8, 12)], [7], 7, 3e-3, {}, "sort", 4),
    learning_rates=[0.00123456789] * 12,
)


@pytest.mark.parametrize(
    ("asked", "options", "expected"),
    [
        (
            {"task": "sort"},
            [],
            "--task sort --layer 7 --algorithm grpo --steps 150 --seed 0 --learning-rate 0.00123456789",
        ),
        (
            {"task": "sort", "chat": False, "seed": 4, "revision": "v1", "unsafe": True, "algorithm": "gspo"}
            | {"steps": 9, "trust_remote_code": True},
            ["beta=0", " learning_rate = 1", "learning_rate_x=2"],
            "--task sort --layer 7 --algorithm gspo --steps 9 --seed 4 --set beta=0 --set learning_rate_x=2 "
            "--learning-rate 0.00123456789 --plain --revision v1 --trust-remote-code --unsafe",
        ),
        (
            {"dataset": "my rows.jsonl", "reward": "r.py:f", "chat": True},
            [],
            "--dataset 'my rows.jsonl' --reward r.py:f --layer 7 --algorithm grpo --steps 150 --seed 0 "
            "--learning-rate 0.00123456789 --chat",
        ),
        (
            {"task": "sort", "system": "Be short.", "shots": 2},
            [],
            "--task sort --layer 7 --algorithm grpo --steps 150 --seed 0 --learning-rate 0.00123456789 "
            "--system 'Be short.' --shots 2",
        ),
    ],
)
def test_nothing_is_dropped_or_rounded(asked, options, expected):
    command = train_command(ProbeSettings(model="m", **asked), options, RANKING)
    assert command == f"onelayer train m {expected} --out run"


def test_several_blocks_are_named_as_train_takes_them():
    ranking = LayerRanking(**{**vars(RANKING), "pick": None, "learning_rates": None})
    words = shlex.split(train_command(ProbeSettings(model="m", task="sort"), [], ranking))
    assert words[words.index("--layer") + 1] == "3,4,5,6,7" and "0.003" in words
