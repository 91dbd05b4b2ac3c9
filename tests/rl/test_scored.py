"""TRL's LM head on a CPU scores what has a label, and gives what it gave."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import scored_positions, shared_prefix
from peft_onelayer.rl.scored import ScoredPositions

pytestmark = pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="this TRL has no fused LM head")


def scores(model, labels, hooked):
    """What the fused head gives, the gradients of the model, and how many positions the head was given."""
    model = copy.deepcopy(model)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    scored = ScoredPositions(model)
    if hooked:
        scored.on_train_begin(None, None, None)
    output = model(input_ids=token_batch(), labels=labels, fused_lm_head=True)
    if output.loss.requires_grad:
        (output.loss + output.entropy.sum()).backward()
    assert scored.start == 0
    scored.remove()
    return output, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("first", [0, 1, 2, 7, 9, None])
def test_the_output_is_the_same_and_so_are_gradients(first):
    labels = token_batch().clone()
    if first is None:
        labels[:] = -100
    else:
        labels[:, :first] = -100
        labels[1, : first + 1] = -100
    model = build("Llama")
    (plain, expected), (cut, got) = (scores(model, labels, hooked) for hooked in (False, True))
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        assert getattr(plain, name).shape == getattr(cut, name).shape
        assert torch.allclose(getattr(plain, name).float(), getattr(cut, name).float(), atol=1e-6), name
    for a, b in zip(expected, got, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))


def test_a_plain_call_is_left_alone():
    model = build("Llama")
    scored = ScoredPositions(model)
    expected = model(input_ids=token_batch(), labels=token_batch())
    scored.on_train_begin(None, None, None)
    got = model(input_ids=token_batch(), labels=token_batch())
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)


def test_a_trainer_scores_the_completions_only(tokenizer, tmp_path, monkeypatch):
    lengths, own = [], ScoredPositions._cut

    def noting(self, decoder, args, output):
        own(self, decoder, args, output)
        if self.start:
            lengths.append(output.last_hidden_state.size(1))

    monkeypatch.setattr(ScoredPositions, "_cut", noting)
    results = []
    for hooked in (False, True):
        settings = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5}
        settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        trainer = GRPOTrainer(
            build(),
            reward_funcs=lambda completions, **columns: [float(len(set(text)) % 3) for text in completions],
            args=GRPOConfig(str(tmp_path), beta=0.1, learning_rate=1e-3, **settings),
            train_dataset=Dataset.from_list([{"prompt": f"{c}bcdefghij"} for c in "klmnopqr"]),
            processing_class=tokenizer,
            peft_config=SingleLayerConfig(layer=2, task_type="CAUSAL_LM"),
        )
        shared_prefix(trainer)
        if hooked:
            scored_positions(trainer)
        trainer.train()
        results.append({name: p.detach() for name, p in trainer.model.named_parameters() if ".default." in name})
    assert set(lengths) == {6}  # five tokens, and the position before the first
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-4)


def test_a_reference_beside_the_model_is_cut_by_the_same_callback(logged):
    model, reference = build("Llama"), build("Llama")
    handler = CallbackHandler([DefaultFlowCallback()], model, None, None, None)
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    trainer = SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=accelerator,
        callback_handler=handler,
        add_callback=handler.add_callback,
        train=lambda: None,
    )
    scored = scored_positions(trainer)
    assert handler.callbacks[1:] == [scored] and scored.reference.model is reference and not logged
    for begins in (True, False):
        (scored.on_train_begin if begins else scored.on_train_end)(None, None, None)
        for hooked in (model, reference):
            assert bool(hooked._forward_pre_hooks) == bool(hooked.model._forward_hooks) == begins
