"""What is put on a model while a trainer trains leaves it when training ends, be it by an exception, and is away while
another trainer trains the model."""

import contextlib

import pytest
import torch
from peft import get_peft_model
from test_prefix import model_of, trainer_of
from transformers import TrainerCallback

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import packed_prompts, scored_positions, shared_prefix, shared_prompts

CALLS = [shared_prefix, shared_prompts, packed_prompts, scored_positions]


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def hooks(model):
    return [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]


@pytest.mark.parametrize("algorithm", [pytest.param("dpo", marks=pytest.mark.more), "grpo"])
def test_after_an_interrupted_run_another_trainer_trains_the_model_as_ever(algorithm, tokenizer, tmp_path):
    def run(interrupted_before):
        model = get_peft_model(model_of("Qwen3"), SingleLayerConfig(layer=2, task_type="CAUSAL_LM"))
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        if interrupted_before:
            trainer = trainer_of(algorithm, model, tokenizer, tmp_path)
            before = hooks(model)
            kept, *_ = [share(trainer) for share in CALLS]
            trainer.add_callback(Interrupt())
            with contextlib.suppress(KeyboardInterrupt):
                trainer.train()
            assert hooks(model) == before and not kept.kept
            model.delete_adapter("ref")
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(start[name])
        trainer = trainer_of(algorithm, model, tokenizer, tmp_path)
        shared = [share(trainer) for share in CALLS]
        trainer.train()
        assert shared[0].off is None and shared[2].off is None
        return {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}

    fresh, after = run(False), run(True)
    assert all(torch.equal(fresh[name], after[name]) for name in fresh)


@pytest.mark.parametrize("share", CALLS)
def test_a_second_call_for_one_trainer_is_refused(share, tokenizer, tmp_path):
    model = get_peft_model(model_of("Qwen3"), SingleLayerConfig(layer=2, task_type="CAUSAL_LM"))
    trainer = trainer_of("grpo", model, tokenizer, tmp_path)
    share(trainer)
    with pytest.raises(ValueError, match="already; call this once for each trainer"):
        share(trainer)


class Inside(TrainerCallback):
    """Trains with another trainer behind the first step, and notes the passes of the outer one before and behind."""

    def __init__(self, other, passes):
        self.other, self.passes, self.noted = other, passes, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.noted.append(self.passes())
            self.other.train()
            self.noted.append(self.passes())


def test_a_trainer_inside_the_training_of_another_finds_the_model_without_its_hooks(tokenizer, tmp_path):
    model = get_peft_model(model_of("Qwen3"), SingleLayerConfig(layer=2, task_type="CAUSAL_LM"))
    options = {"num_iterations": 2, "per_device_train_batch_size": 8, "beta": 0.0}
    outer, inner = (trainer_of("grpo", model, tokenizer, tmp_path, **options, seed=seed) for seed in (0, 1))
    before = hooks(model)
    shared, shared_inside = ([share(trainer) for share in CALLS] for trainer in (outer, inner))

    def passes():
        prefix, _, packed, _ = shared
        return prefix.whole + prefix.started, packed.whole + packed.packed

    inside = Inside(inner, passes)
    outer.add_callback(inside)
    outer.train()
    first, second = inside.noted
    assert first == second and min(first) > 0, "nothing of the outer trainer's acted"
    assert all(now > then for now, then in zip(passes(), second, strict=True)), "for its own second step it did"
    assert shared_inside[0].whole and shared_inside[2].packed + shared_inside[2].whole, "the inner trainer's own"
    assert hooks(model) == before
