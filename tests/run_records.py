"""A run.json for tests."""

from peft_onelayer.records.run import BaseModel, DataSource, RunRecord, RunSettings

MODEL = BaseModel("base", None, {}, "float32", 12, 519_168)
TASK = DataSource("arithmetic", {}, False)
SETTINGS = RunSettings(MODEL, "grpo", "trl.GRPOTrainer", TASK, 0, {"beta": 0.0}, layer="5")
RECORD = RunRecord("onelayer train", SETTINGS, {}, "unfinished", [5])
