"""A run.json for tests."""

from dataclasses import replace

from peft_onelayer.records.figures import Figures, Measured
from peft_onelayer.records.run import BaseModel, DataSource, HeldOutScore, RunRecord, RunResults, RunSettings

MODEL = BaseModel("base", None, {}, "float32", 12, 519_168)
TASK = DataSource("arithmetic", {}, False)
SETTINGS = RunSettings(MODEL, "grpo", "trl.GRPOTrainer", TASK, 0, {"beta": 0.0}, layer="5")
RECORD = RunRecord("onelayer train", SETTINGS, {}, "unfinished", [5])


def choosing(n, steps=2, source=TASK, seed=0):
    """The run.json of a run that kept the best of so many steps by `n` problems, beside `n` of the verdict."""
    scores = [HeldOutScore(step, 0.5, 0.1) for step in range(1, 1 + steps)]
    results = RunResults(steps, evaluations=scores, kept_step=1, held_out=Measured(n, 4, Figures(0.5, 0.1)))
    config = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    settings = replace(SETTINGS, task=source, seed=seed, config=config, eval_every=1, keep="best")
    return replace(RECORD, settings=settings, status="finished", results=results)
