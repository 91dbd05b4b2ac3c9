"""The script and the configuration files of examples/distributed/."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from peft import AutoPeftModelForCausalLM
from tuner.helpers import base_weights, masters

from distributed.launch import torchrun

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"
CONFIGS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.more
def test_the_script_trains_on_two_processes(tmp_path):
    output = torchrun(EXAMPLES / "train_grpo.py", "--cpu", "--steps", "2", "--out", tmp_path / "adapter")
    assert output.count("2 processes trained the adapter") == 1
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    base = base_weights(model)
    trained = masters(model)
    assert model.peft_config["default"].layer_indices == [6] and len(trained) == 11
    assert all((master != base[name]).any() for name, master in trained.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_configuration(name):
    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.distributed_type == CONFIGS[name] and config.mixed_precision == "bf16"
    assert name in (EXAMPLES / "README.md").read_text()
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
