"""Texts of `--set` to the values of TRL's fields."""

import dataclasses
import json
import re

import pytest
from accelerate.parallelism_config import ParallelismConfig
from transformers.trainer_utils import SchedulerType
from trl import DPOConfig, GRPOConfig, RLOOConfig
from trl.experimental.online_dpo import OnlineDPOConfig
from trl.experimental.sdft import SDFTConfig

from peft_onelayer.rl import GiGPOConfig
from peft_onelayer.rl.algorithms import ALGORITHMS
from peft_onelayer.rl.config_fields import check_names, config_fields
from peft_onelayer.rl.settings import convert_settings, parse_settings

CONFIGS = sorted({algorithm.config_class for algorithm in ALGORITHMS.values()}, key=lambda config: config.__name__)


def convert(config, **settings):
    return convert_settings(config, settings)


@pytest.mark.parametrize(
    ("config", "field", "text", "value"),
    [
        (GRPOConfig, "learning_rate", "1e-5", 1e-5),
        (GRPOConfig, "max_grad_norm", "inf", float("inf")),
        (GRPOConfig, "num_generations", "16", 16),
        (GRPOConfig, "epsilon_high", "0.28", 0.28),
        (GRPOConfig, "epsilon_high", "None", None),
        (GRPOConfig, "mask_truncated_completions", "True", True),
        (GRPOConfig, "mask_truncated_completions", "no", False),
        (GRPOConfig, "bf16", "none", None),
        (GRPOConfig, "bf16", "0", False),
        (GRPOConfig, "loss_type", "bnpo", "bnpo"),
        (GRPOConfig, "scale_rewards", "false", False),
        (GRPOConfig, "scale_rewards", "batch", "batch"),
        (GiGPOConfig, "scale_rewards", "none", "none"),  # annotated `str | None`, but "none" is the name of a scaling
        (GiGPOConfig, "gamma", "0.9", 0.9),
        (GRPOConfig, "vllm_server_host", "none", "none"),  # text that cannot be None stays text
        (GRPOConfig, "run_name", "a=b, c", "a=b, c"),
        (GRPOConfig, "lr_scheduler_type", "cosine", SchedulerType.COSINE),
        (GRPOConfig, "lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        (
            GRPOConfig,
            "generation_kwargs",
            '{"top_p": 0.9, "suppress_tokens": [1]}',
            {"top_p": 0.9, "suppress_tokens": [1]},
        ),
        (GRPOConfig, "model_init_kwargs", "none", None),
        (GRPOConfig, "reward_weights", "1,0.5", [1.0, 0.5]),
        (GRPOConfig, "reward_weights", "[1, 0.5]", [1.0, 0.5]),
        (GRPOConfig, "report_to", "none", "none"),  # annotated as if it could be None
        (GRPOConfig, "report_to", "wandb", "wandb"),
        (GRPOConfig, "report_to", '["wandb", "tensorboard"]', ["wandb", "tensorboard"]),
        (GRPOConfig, "pad_to_multiple_of", "8", 8),
        (GRPOConfig, "pad_to_multiple_of", "auto", "auto"),
        (GRPOConfig, "trackio_static_space_id", "false", False),
        (GRPOConfig, "trackio_static_space_id", "me/space", "me/space"),
        (GRPOConfig, "include_num_input_tokens_seen", "no", "no"),
        (GRPOConfig, "include_num_input_tokens_seen", "true", True),
        (RLOOConfig, "reward_clip_range", "-1,1", (-1.0, 1.0)),
        (RLOOConfig, "reward_clip_range", "[-1, 1]", (-1.0, 1.0)),
        (DPOConfig, "loss_type", "ipo", ["ipo"]),
        (DPOConfig, "loss_type", "sigmoid, sft", ["sigmoid", "sft"]),
        (DPOConfig, "max_length", "none", None),
        (OnlineDPOConfig, "beta", "0.2", [0.2]),
        (SDFTConfig, "distillation_mode", "sampled_token", "sampled_token"),
    ],
)
def test_values(config, field, text, value):
    converted = convert(config, **{field: text})[field]
    assert converted == value and type(converted) is type(value)


def test_a_dataclass_is_made_from_json():
    made = convert(GRPOConfig, parallelism_config='{"tp_size": 2}')["parallelism_config"]
    assert isinstance(made, ParallelismConfig) and made.tp_size == 2


def test_a_file_may_stand_for_a_dict(tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    assert convert(GRPOConfig, deepspeed=str(tmp_path / "zero.json")) == {"deepspeed": str(tmp_path / "zero.json")}


@pytest.mark.parametrize(
    ("config", "setting", "expected"),
    [
        (GRPOConfig, "beta=abc", "a number"),
        (GRPOConfig, "learning_rate=nan", "a number"),
        (GRPOConfig, "beta=", "a number"),
        (GRPOConfig, "epsilon_high=high", "a number or none"),
        (GRPOConfig, "beta=none", "a number"),
        (GRPOConfig, "max_steps=1.5", "an integer"),
        (GRPOConfig, "use_vllm=maybe", "true or false"),
        (GRPOConfig, "loss_type=grop", "grpo or dr_grpo or dapo or bnpo or cispo or sapo or luspo or vespo"),
        (GRPOConfig, "scale_rewards=mean", "true or false or group or batch or none"),
        (GRPOConfig, "eval_strategy=sometimes", "one of no, steps, epoch"),
        (GRPOConfig, "generation_kwargs=top_p", "a JSON object or none or the path of a file"),
        (GRPOConfig, "generation_kwargs={top_p: 1}", "a JSON object or none or the path of a file"),
        (GRPOConfig, "deepspeed=no-such-file.json", "a JSON object or none or the path of a file"),
        (GRPOConfig, "reward_weights=1,x", "a list (a number), in JSON or separated by commas or none"),
        (GRPOConfig, "report_to=[wandb]", "text or a list (text), in JSON or separated by commas"),
        (GRPOConfig, 'parallelism_config={"tp": 2}', "a JSON object or none"),
        (RLOOConfig, "reward_clip_range=1", "a list (a number, a number), in JSON or separated by commas or none"),
        (SDFTConfig, "distillation_mode=all", "sampled_token or full_logits or topk_logits"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(config, setting, expected):
    with pytest.raises(ValueError, match="^" + re.escape(f"--set {setting}: expected {expected}") + "$"):
        convert_settings(config, parse_settings([setting]))


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("lr", "lr_scheduler_kwargs"),
        ("epsilon_hi", "epsilon_high"),
        ("generations", "num_generations"),
        ("kl", None),
        ("", None),
    ],
)
def test_an_unknown_field_lists_near_ones(field, near):
    with pytest.raises(ValueError, match=f"^GRPOConfig has no field {field!r}") as error:
        convert_settings(GRPOConfig, {field: "1"})
    assert "\n" not in str(error.value)
    assert near is None or near in str(error.value).partition("did you mean ")[2]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_can_be_set(config):
    """Each default, written down, is read back."""
    for field in dataclasses.fields(config):
        factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if factory else field.default
        text = json.dumps(default) if isinstance(default, (dict, list)) else str(default)
        if default is None and config is GiGPOConfig and field.name == "scale_rewards":
            default = "none"  # TRL's own "none", not the absence of a value
        assert convert_settings(config, {field.name: text}) == {field.name: default}


def test_settings_are_split_at_the_first_equals_sign():
    assert parse_settings(["beta=0.1", " run_name = a=b "]) == {"beta": "0.1", "run_name": "a=b"}


@pytest.mark.parametrize("settings", [["beta"], ["=1"], [""], ["beta=1", "beta=2"]])
def test_a_setting_that_is_none_is_refused(settings):
    with pytest.raises(ValueError, match=r"^--set (takes field=value|beta is given twice)"):
        parse_settings(settings)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_the_sources_tell_the_fields_of_every_configuration(algorithm):
    fields = {field.name for field in dataclasses.fields(algorithm.config_class)}
    assert algorithm.config_class.__name__ == algorithm.config_name
    assert config_fields(algorithm) == fields


def test_a_configuration_whose_sources_lie_elsewhere_is_left_to_its_class(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_onelayer.rl.config_fields.CONFIGS", ())
    assert config_fields(ALGORITHMS["grpo"]) is None
    check_names(ALGORITHMS["grpo"], ["no_such_field"], {})
