"""GiGPO's groups and the selected tokens of the entropy option are those of all processes."""

from pathlib import Path

import pytest
import torch
from distributed.launch import run_on_two
from test_entropy import make, make_inputs, reference
from test_gigpo_trainer import expected, rollouts
from tuner.helpers import same

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_on_two(Path(__file__).with_name("two_processes.py"), folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_a_group_on_two_processes(found):
    inputs = [row for each in found for row in each["GiGPO"][0]]
    ids = [row for each in found for row in rollouts(each["GiGPO"][1])]
    assert ids == [row for each in found for row in rollouts(each["GRPO"][1])]
    padded = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), batch_first=True)
    whole = {"completion_ids": padded, "completion_mask": (padded != 0).long()}
    episode = [value for each in found for value in each["GRPO"][1]["advantages"].tolist()]
    wanted, _ = expected(inputs, whole, episode)
    advantages = [row for each in found for row in each["GiGPO"][1]["advantages"]]
    for row, right, tokens in zip(advantages, wanted, ids, strict=True):
        torch.testing.assert_close(row[: len(tokens)], right[: len(tokens)], rtol=1e-6, atol=1e-6)
        assert not row[len(tokens) :].any()
    assert found[0]["GiGPO"][2] == found[1]["GiGPO"][2] and len(found[0]["GiGPO"][2]) == 4
    # Without the rows of the other process the second group would come out otherwise.
    alone, _ = expected(inputs[:6], {name: value[:6] for name, value in whole.items()}, episode[:6])
    assert torch.equal(alone[:4], wanted[:4]) and not torch.equal(alone[4:], wanted[4:6])


def test_a_run_on_two_processes(found):
    assert same(found[0]["weights"], found[1]["weights"])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_selected_tokens_of_both_processes(found, tmp_path, loss_type):
    """Gradients are averaged over the processes; the mean of their losses is that of the whole batch."""
    trainer = make(tmp_path, loss_type=loss_type)
    wanted, _ = reference(trainer.model, make_inputs(trainer.model), loss_type, 0.2, 0.0, 0.0)
    assert found[0][loss_type] != found[1][loss_type]
    assert (found[0][loss_type] + found[1][loss_type]) / 2 == pytest.approx(wanted.item(), rel=1e-5)
