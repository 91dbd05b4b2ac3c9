"""A resumed run that goes over its prompts more than once: TRL begins their order again, with PEFT and without."""

import json
from importlib.resources import files

import demo_model
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from peft_onelayer.runs.log import RunLog
from peft_onelayer.tasks import load_task

BASE = str(files("peft_onelayer") / "demo_model")


def test_the_sampler_forgets_how_often_it_has_gone_over_the_data():
    """When this fails TRL resumes exactly, and what docs/runs.md and `train` say of it has to go."""
    sampler = RepeatSampler(range(6), mini_repeat_count=2, batch_size=2, seed=0)
    first, second = list(sampler), list(sampler)
    assert first != second and sorted(first) == sorted(second)
    assert list(RepeatSampler(range(6), mini_repeat_count=2, batch_size=2, seed=0)) == first
    assert not hasattr(sampler, "set_epoch")


@pytest.mark.more
@pytest.mark.parametrize(("prompts", "step", "same"), [(4, 1, False), (8, 1, True), (8, 2, False), (24, 2, True)])
def test_plain_trl_resumes_exactly_only_in_its_first_pass(tmp_path, prompts, step, same):
    task = load_task("arithmetic")
    rows = task.rows("train", prompts, 0)

    def run(out, **resume):
        model, tokenizer = demo_model.load()
        config = GRPOConfig(
            output_dir=str(tmp_path / out),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=5,
            max_steps=4,
            save_steps=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            report_to="none",
        )
        data = Dataset.from_list(rows)
        trainer = GRPOTrainer(model, task.reward, config, train_dataset=data, processing_class=tokenizer)
        trainer.train(**resume)
        return trainer.model.state_dict()

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items()) == same


@pytest.mark.more
@pytest.mark.parametrize(("prompts", "same"), [(4, False), (24, True)])
def test_such_a_run_says_so(onelayer, tmp_path, monkeypatch, prompts, same):
    (tmp_path / "few.py").write_text(
        "from peft_onelayer.tasks import load_task\n\nMAX_COMPLETION_TOKENS = 5\n"
        "arithmetic = load_task('arithmetic')\n\n\n"
        f"def rows(split, n, seed):\n    return arithmetic.rows(split, min(n, {prompts}), seed)\n\n\n"
        "def reward(**kwargs):\n    return arithmetic.reward(**kwargs)\n"
    )
    run = ["train", BASE, "--task", tmp_path / "few.py"]
    run += ["--layer", "5", "--steps", "4", "--prompts", "4", "--completions", "4", "--learning-rate", "1e-3"]
    run += ["--set", "save_steps=1", "--eval-problems", "0"]
    write = RunLog.write

    def stop(log, step, logs):
        if step == 3:
            raise KeyboardInterrupt
        write(log, step, logs)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", stop)
        ended = onelayer(*run, "--out", tmp_path / "run")
        assert ended[0] == 130, ended
    code, lines, _ = onelayer("train", "--resume", "--out", tmp_path / "run")
    assert code == 0 and any("gone once over its 4 prompts" in line for line in lines) != same, lines
    assert onelayer(*run, "--out", tmp_path / "whole")[0] == 0
    digests = [json.loads((tmp_path / name / "run.json").read_text())["results"]["sha256"] for name in ("run", "whole")]
    assert (digests[0] == digests[1]) == same
