"""The package without its `__init__`: workers that need neither torch nor peft start in no time."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[4] / "peft_onelayer")]
