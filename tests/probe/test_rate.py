"""The learning rate of a run that was given none."""

import demo_model
import pytest
import torch
from safetensors.torch import save_file

from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.probe.rate import find_learning_rate
from peft_onelayer.probe.updates import FOUND_RATE_KL
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.tasks import Task, load_task


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.more)], ids=str)
@pytest.mark.parametrize(
    "layers",
    [6, pytest.param([3, 4, 5, 6, 7], marks=pytest.mark.more), pytest.param(None, marks=pytest.mark.more)],
    ids=["block", "blocks", "full"],
)
def test_the_rate_moves_the_policy_within_the_bounds_and_the_model_stays(layers, dtype):
    model, tokenizer = demo_model.load()
    model.to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = load_task("arithmetic")
    recipe = make_recipe("grpo", task)
    found = find_learning_rate(model, tokenizer, task, layers, recipe)
    blocks = {None: 12, 6: 1}.get(layers if isinstance(layers, int | None) else 0, 5)
    assert found.blocks == blocks and found.reached and FOUND_RATE_KL[0] <= found.kl <= FOUND_RATE_KL[1]
    assert found.learning_rate > 10 * recipe.settings["learning_rate"]
    assert 0 < found.tokens_generated <= 64 * 8 * task.max_completion_tokens
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


@pytest.mark.more
def test_several_blocks_get_a_lower_rate_than_one():
    model, tokenizer = demo_model.load()
    task = load_task("arithmetic")
    recipe = make_recipe("grpo", task)
    one, five = (find_learning_rate(model, tokenizer, task, layers, recipe) for layers in (6, "4-8"))
    assert one.blocks == 1 and five.blocks == 5
    # A first step of five moves the policy about five times as far: the square root of that is taken back.
    assert one.learning_rate / 5 < five.learning_rate < one.learning_rate / 1.5
    assert five.describe().startswith(f"learning rate {five.learning_rate:g} for 5 blocks: 2.2 times that at which a ")


def test_under_a_mask_the_step_is_that_of_the_entries_that_train(tmp_path):
    model, tokenizer = demo_model.load()
    task = load_task("arithmetic")
    recipe = make_recipe("grpo", task)
    torch.manual_seed(0)
    mask = {n: torch.rand(p.shape) < 0.1 for n, p in model.named_parameters() if n.startswith("model.layers.6.")}
    save_file(mask, tmp_path / "mask.safetensors")
    whole = find_learning_rate(model, tokenizer, task, 6, recipe)
    part = find_learning_rate(model, tokenizer, task, 6, recipe, mask=str(tmp_path / "mask.safetensors"))
    assert part.reached and part.learning_rate > 3 * whole.learning_rate


def test_where_every_reward_is_equal_the_error_holds_the_completions():
    model, tokenizer = demo_model.load()
    arithmetic = load_task("arithmetic")
    task = Task("hopeless", arithmetic.rows, lambda completions, **kwargs: [0.0] * len(completions), 8)
    with pytest.raises(NothingToLearnError, match=r"of hopeless \(mean 0\.00\)") as error:
        find_learning_rate(model, tokenizer, task, 6, make_recipe("grpo", task))
    assert len(error.value.rollouts) == 64 * 8 and all(r.reward == 0 for r in error.value.rollouts)
