"""The demo from Python, where it cannot gain."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_onelayer.runs import demo


@pytest.fixture
def untrained(tmp_path):
    """The demo model before its training: it never earns a reward."""
    folder = demo.files("peft_onelayer") / "demo_model"
    set_seed(0)
    config = AutoConfig.from_pretrained(str(folder))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untrained")
    AutoTokenizer.from_pretrained(str(folder)).save_pretrained(tmp_path / "untrained")
    return str(tmp_path / "untrained")


@pytest.mark.more
def test_a_base_that_never_earns_a_reward(tmp_path, untrained):
    with pytest.raises(ValueError, match=r"nothing to learn from.* The likely reason: .*"):
        demo.run_demo(tmp_path / "demo", model=untrained, steps=2)
    assert not (tmp_path / "demo" / "adapter").exists()
