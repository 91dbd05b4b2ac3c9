"""What is estimated of a run's memory is what the run takes."""

import pytest
from memory_peak import METHODS, estimated_and_measured
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.real


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fields", [{"beta": 0.0}, {"beta": 0.0, "gradient_checkpointing": False}], ids=str)
def test_the_estimate_is_within_a_tenth(smollm2, method, fields):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    estimate, measured = estimated_and_measured(model, method, 15, smollm2, 2, 4, **fields)
    assert estimate.peak == pytest.approx(measured, rel=0.1)
