"""Limits and types of JSON that may come from a stranger."""

import json
import sys

import pytest
from run_records import RECORD

from peft_onelayer.records.adapter_config import AdapterConfig, check_adapter_config
from peft_onelayer.records.files import parse_fields
from peft_onelayer.records.run import RunRecord
from peft_onelayer.records.text import BITS, DEPTH, LENGTH


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (deep(DEPTH), f"x.json is nested more than {DEPTH} deep"),
        (deep(900), f"x.json is nested more than {DEPTH} deep"),
        ("x" * (LENGTH + 1), f"holds a text of {LENGTH + 1:,} characters"),
        ([{"x" * (LENGTH + 1): 1}], f"holds a text of {LENGTH + 1:,} characters"),
        ([2**BITS], f"holds an integer of {BITS + 1} bits"),
        (10**4000, "holds an integer of 13288 bits"),
        (-(2**BITS), f"holds an integer of {BITS + 1} bits"),
    ],
    ids=range(7),
)
def test_beyond_the_limits(value, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_fields(json.dumps({"a": value}), "x.json")
    assert len(str(error.value)) < 200


def test_within_the_limits():
    value = {"a": deep(DEPTH - 2), "b": "x" * LENGTH, "c": 2**BITS - 1, "d": float("inf"), "e": 1e300, "f": True}
    assert parse_fields(json.dumps(value), "x.json") == value
    wide = {"a": [[{}, []]] * 50_000}
    assert parse_fields(json.dumps(wide), "x.json") == wide


def test_a_record_names_a_hostile_field_in_one_short_line():
    fields = json.loads(RECORD.to_json())
    for change in ({"command": ["a"]}, {"a\nb" * 1000: 1}, {"settings": {**fields["settings"], "x\x1b" * 500: {}}}):
        with pytest.raises(ValueError) as error:
            RunRecord.from_dict(fields | change, "run.json")
        assert str(error.value).isprintable() and len(str(error.value)) < 500
    fields["results"] = {"steps": 1, "sha256": {"a\n" * 1000: 3}}
    with pytest.raises(ValueError, match="expected text") as error:
        RunRecord.from_dict(fields, "run.json")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_every_field_of_adapter_config_has_a_type():
    good = {"peft_type": "SINGLE_LAYER", "layer": 3, "layer_indices": [3], "num_layers": 4, "more": {"of": "PEFT's"}}
    check_adapter_config(good, "f")
    wrong = {"x" * sys.getrecursionlimit(): 1}
    for name in AdapterConfig.__dataclass_fields__:
        for value in (2.5, [2.5], [[]], {"a": 1} if name not in ("auto_mapping", "encoding", "trained_on") else 3):
            with pytest.raises(ValueError, match=f"^f: {name}") as error:
                check_adapter_config(good | {name: value}, "f")
            assert len(str(error.value)) < 300
    check_adapter_config(good | wrong, "f")
    for name in ("target_modules", "layer", "base_model_name_or_path", "revision"):
        with pytest.raises(ValueError, match=rf"^f: {name} has 1,000,000 characters"):
            check_adapter_config(good | {name: "x" * 1_000_000}, "f")
