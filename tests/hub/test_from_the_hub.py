"""What takes an adapter takes its Hub id: PEFT's own loaders, inspect, merge and export."""

import json

import pytest
from loopback import OTHER_TOKEN, Fault
from safetensors.torch import load_file

PUSHED: dict[str, bytes] = {}
LOADS_BIT_EQUAL = """
import torch, peft_onelayer
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 20)[None]
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.bfloat16)
with torch.no_grad():
    untouched = base(ids).logits
    here = PeftModel.from_pretrained(base, {adapter!r}).eval()(ids).logits
    result = [torch.equal(here, untouched)]
    for there in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/tiny"), "me/gsm"),
        AutoPeftModelForCausalLM.from_pretrained("me/gsm"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/tiny"), "me/gsm", subfolder="peft"),
    ):
        result.append([type(there.peft_config["default"]).__name__, torch.equal(there.eval()(ids).logits, here)])
"""


@pytest.fixture
def published(hub, ask, base_folder, quick):
    """The adapter, sparse and for plain PEFT, on the Hub as me/gsm, and its base as org/tiny."""
    hub.add("org/tiny", {path.name: path.read_bytes() for path in base_folder.iterdir()})
    if not PUSHED:
        assert ask("push", quick, "me/gsm", "--base-model", "org/tiny", "--with-peft").code == 0
        PUSHED.update(hub.files("me/gsm"))
    hub.add("me/gsm", dict(PUSHED))
    return hub.repos["me/gsm"]


def test_peft_loads_it_bit_equal(published, ask, quick, base_folder):
    answer = ask(code=LOADS_BIT_EQUAL.format(base=str(base_folder), adapter=str(quick)))
    assert answer.code == 0, answer.err
    assert answer.result == [
        *(False, ["SingleLayerConfig", True], ["SingleLayerConfig", True]),
        ["LNTuningConfig", True],  # as the card says it
    ]


@pytest.mark.parametrize("fault", [Fault("HEAD .*adapter_model", 503), Fault("GET /object", "drop")])
def test_from_pretrained_gets_over_a_fault_or_the_second_try_completes(published, hub, ask, base_folder, fault):
    hub.faults = [Fault(fault.pattern, fault.what)]
    code = f"""
import torch, peft_onelayer
from peft import PeftModel
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM
for attempt in (1, 2):
    base = AutoModelForCausalLM.from_pretrained({str(base_folder)!r}, dtype=torch.bfloat16)
    try:
        model = PeftModel.from_pretrained(base, "me/gsm")
    except (OSError, HTTPError):
        continue
    result = [attempt, model.peft_config["default"].layer_indices]
    break
"""
    answer = ask(code=code)
    assert answer.result is not None and answer.result[0] <= 2 and answer.result[1] == [1], answer.err
    assert hub.faults[0].times == 0


def test_inspect_fetches_the_adapter_alone(published, hub, ask):
    before = len(hub.requests)
    found = json.loads(ask("inspect", "me/gsm", "--json").out)
    assert (found["layers"], found["encoding"], found["base"]["name"]) == ([1], "sparse", "org/tiny")
    assert not any("org/tiny" in path for _, path, _ in hub.requests[before:])
    table = ask("inspect", "me/gsm").out
    assert "self_attn.q_proj.weight" in table and "org/tiny" in table


def test_merge_and_export_by_hub_ids(published, hub, ask, quick, tmp_path):
    answer = ask("merge", "org/tiny", "me/gsm", tmp_path / "merged")
    assert answer.code == 0, answer.err
    code = f"""
import torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM
there = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}).state_dict()
here = AutoPeftModelForCausalLM.from_pretrained({str(quick)!r}, dtype=torch.bfloat16).merge_and_unload().state_dict()
result = sorted(there) == sorted(here) and all(torch.equal(there[name], here[name]) for name in here)
"""
    assert ask(code=code).result is True
    answer = ask("export", "me/gsm", tmp_path / "flat", "--format", "flat")
    assert answer.code == 0, answer.err
    assert load_file(tmp_path / "flat" / "sparse_weights.safetensors")


@pytest.mark.parametrize("fault", [Fault("GET /object", "drop"), Fault("GET /api/models", 503)])
def test_a_fault_is_one_line_and_the_second_try_completes(published, hub, ask, fault):
    hub.faults = [Fault(fault.pattern, fault.what)]
    answer = ask("inspect", "me/gsm")
    if answer.code:
        assert answer.code == 1 and answer.out == "" and len(answer.err) == 1 and "me/gsm" in answer.err[0], answer
        answer = ask("inspect", "me/gsm")
    assert answer.code == 0 and hub.faults[0].times == 0, answer


@pytest.mark.parametrize("command", [["inspect", "me/gsm"], ["merge", "org/tiny", "me/gsm", "out"]])
def test_what_may_not_be_read_is_one_line(published, ask, tmp_path, command):
    published.gated = True
    command = [str(tmp_path / part) if part == "out" else part for part in command]
    answer = ask(*command, token=OTHER_TOKEN)
    assert answer.code == 1 and answer.out == "" and len(answer.err) == 1 and "me/gsm" in answer.err[0], answer
    assert not (tmp_path / "out").exists()


@pytest.mark.more
def test_what_a_run_would_hold_needs_a_configuration_only(hub, ask, base_folder):
    hub.add("org/shape", {"config.json": (base_folder / "config.json").read_bytes()})
    answer = ask("train", "org/shape", "--task", "arithmetic", "--layer", "1", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert [one["what"] for one in json.loads(answer.out)["estimates"]] == ["block 1", "full", "LoRA r=16, all linears"]
    answer = ask("train", "org/nothing", "--task", "arithmetic", "--layer", "1", "--dry-run")
    assert answer.code != 0 and len([line for line in answer.err if "org/nothing" in line]) == 1
