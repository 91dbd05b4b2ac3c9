"""How a run samples: from its TRL configuration to the settings that rankings and evaluations sample by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.fields import read
from peft_onelayer.rollouts.settings import HOW_MANY, Sampling, check_generation

from .algorithms import Algorithm
from .recipe import refuse_fields
from .settings import check_fields, convert_settings, parse_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields with the same name and meaning in TRL's configurations; a trainer whose configuration lacks one leaves it to
# the model's own generation_config.json.
SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "cache_implementation",
    "generation_kwargs",
    "chat_template_kwargs",
    "max_prompt_length",
    "max_tool_calling_iterations",
)
VLLM = {"stop": "stop_strings", "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
# Fields of `Sampling` that are no choice of `--sampling`, and what decides them.
OWN_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in HOW_MANY} | {"prompts_as_text": "the algorithm"}
PAIRS_OPTIONS = {
    "samples": "--pairs-from-task: eight completions of each prompt",
    "greedy": "--pairs-from-task: completions are sampled",
    "seed": "--seed",
    "batch_size": "--set per_device_train_batch_size",
    "prompts_as_text": "the algorithm",
}


def sampling_of(algorithm: Algorithm, fields: Mapping[str, Any], where: str = "the configuration") -> Sampling:
    """How a run of `algorithm` with these fields of its configuration samples.

    Args:
        fields: of the configuration, such as `RunSettings.config`.
        where: they are from, for messages.

    Returns:
        The settings; the defaults for an algorithm that samples nothing.

    Raises:
        ValueError: a field of another type; `generation_kwargs` for vLLM that transformers has no setting for.

    >>> from peft_onelayer.rl.algorithms import load_algorithm
    >>> sampling = sampling_of(load_algorithm("a2po"), {"temperature": 0.7, "max_completion_length": 64})
    >>> sampling.temperature, sampling.max_completion_tokens, sampling.top_k
    (0.7, 64, None)
    """
    if algorithm.completion_length is None:
        return Sampling()
    given = {name: fields.get(name) for name in SAME}
    given["generation_kwargs"] = given["generation_kwargs"] or {}
    given["chat_template_kwargs"] = given["chat_template_kwargs"] or {}
    if fields.get("use_vllm") and isinstance(given["generation_kwargs"], dict):
        given["generation_kwargs"] = _from_vllm(given["generation_kwargs"])
    given["max_completion_tokens"] = fields.get(algorithm.completion_length)
    given["prompts_as_text"] = algorithm.prompts_as_text
    return read(Sampling, given, where)


def sampling_from_text(texts: Sequence[str], own_options: Mapping[str, str] = OWN_OPTIONS) -> dict[str, Any]:
    """The values of `--sampling field=value` texts, by field of `Sampling`.

    Raises:
        ValueError: as `config_from_text`.
    """
    parsed = parse_settings(texts, "--sampling")
    refuse_fields(parsed, own_options, "--sampling")
    return convert_settings(Sampling, parsed, "--sampling")


def with_given(sampling: Sampling, given: Mapping[str, Any], own_options: Mapping[str, str]) -> Sampling:
    """`sampling` with the fields that a user gave.

    Args:
        own_options: fields that something else decides, and what.

    Raises:
        ValueError: a field that is not one of `Sampling`, or of another type; one of `own_options`.
    """
    refuse_fields(given, own_options, "--sampling")
    check_fields(Sampling, given)
    fields = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(Sampling)}
    return read(Sampling, {**fields, **given}, "--sampling")


def sampling_of_run(algorithm: Algorithm, config: TrainingArguments) -> Sampling:
    """`sampling_of` the fields of a run that is still to come.

    Raises:
        ValueError: as `sampling_of`; `generation_kwargs` that TRL cannot hand to transformers.
    """
    fields = config.to_dict()
    if "stop_strings" in (fields.get("generation_kwargs") or {}) and not fields.get("use_vllm"):
        raise ValueError(
            "generation_kwargs sets stop_strings, for which transformers needs the tokenizer, and TRL does not hand it "
            'on; set use_vllm=true and generation_kwargs={"stop": [...]} instead'
        )
    return sampling_of(algorithm, fields)


def _from_vllm(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of vLLM's SamplingParams as those of transformers."""
    renamed = {VLLM.get(name, name): value for name, value in kwargs.items()}
    try:
        check_generation(renamed)
    except ValueError as error:
        raise ValueError(
            f"{error}: vLLM takes it, but rankings and evaluations sample with transformers; name the block with "
            "--layer, and evaluate with --sampling generation_kwargs={}"
        ) from error
    return renamed
