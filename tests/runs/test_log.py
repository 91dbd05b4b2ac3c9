"""log.jsonl has every step once, whatever interrupted the run."""

import json

from peft_onelayer.runs.log import MEAN_OF, RunLog

LOGS = {"reward": 0.5, "completions/mean_length": 4.0, "kl": 0.1, "learning_rate": 1e-3, "grad_norm": 2.0, "loss": 0.0}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_is_there_as_soon_as_its_step_is_done(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, LOGS | {"reward": step / 4})
        last = lines(tmp_path)[-1]
        assert last.pop("seconds") >= 0
        assert last == {
            "step": step,
            "reward": step / 4,
            "length": 4.0,
            "kl": 0.1,
            "loss": 0.0,
            "learning_rate": 1e-3,
            "running_mean": sum(range(1, step + 1)) / 4 / step,
        }
    assert len(lines(tmp_path)) == 3


def test_it_goes_on_from_a_checkpoint_without_doubled_steps(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 16):
        log.write(step, LOGS | {"reward": float(step)})
    before = lines(tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 16, "rew')  # killed here
    log = RunLog(tmp_path, resumed_at=12)
    assert lines(tmp_path) == before[:12]
    log.write(13, LOGS | {"reward": 13.0})
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 14))
    assert lines(tmp_path)[-1]["running_mean"] == before[12]["running_mean"] == sum(range(4, 14)) / MEAN_OF


def test_a_run_that_starts_anew_starts_its_log_anew_and_offline_runs_have_losses(tmp_path):
    RunLog(tmp_path).write(1, LOGS)
    log = RunLog(tmp_path)
    assert lines(tmp_path) == []
    log.write(1, {"loss": 0.7, "learning_rate": 1e-3})
    assert lines(tmp_path)[0].keys() == {"step", "loss", "learning_rate", "seconds"}
