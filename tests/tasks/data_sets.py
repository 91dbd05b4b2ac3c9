"""The data that the tests of data set tasks read: ten rows of our own in data/, and the data sets' own files.

Those files are not in the repository. ONELAYER_TEST_DATA names a folder that holds them, by the names that their
publishers gave them: gsm8k_train.jsonl, gsm8k_test.jsonl, HumanEval.jsonl.gz.
"""

import os
from pathlib import Path

import pytest

OWN = Path(__file__).with_name("data")
FULL = Path(os.environ.get("ONELAYER_TEST_DATA", "nowhere"))


def full(name: str):
    """A parameter: the path of a data set's own file, beyond the default suite, skipped where it is not there."""
    absent = pytest.mark.skipif(not (FULL / name).is_file(), reason=f"ONELAYER_TEST_DATA names no folder with {name}")
    return pytest.param(FULL / name, id=name, marks=[pytest.mark.more, absent])


def own(name: str):
    return pytest.param(OWN / name, id="own")
