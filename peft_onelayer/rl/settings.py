"""Text to the values of a TRL configuration's fields: what `--set field=value` means."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Union

NEAR = 5  # names of near fields in an error
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")

# Annotated as `None | str | list[str]`, but transformers takes the text "none" only.
_ALL = {"report_to": str | list[str]}
# Closed sets that TRL annotates as `str`; GRPOTrainer looks at them after the first generation only.
_GRPO = {
    "loss_type": Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
    "importance_sampling_level": Literal["token", "sequence"],
    "scale_rewards": bool | Literal["group", "batch", "none"],
}


def parse_settings(settings: Sequence[str], option: str = "--set") -> dict[str, str]:
    """Split the texts of `option`, each "field=value".

    Raises:
        ValueError: for a text without "=" or without a field, or a field given twice.

    >>> parse_settings(["beta=0.04", 'generation_kwargs={"top_p": 0.9}'])
    {'beta': '0.04', 'generation_kwargs': '{"top_p": 0.9}'}
    """
    parsed: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"{option} takes field=value, such as {option} temperature=0.7; got {text!r}")
        if name in parsed:
            raise ValueError(f"{option} {name} is given twice: {parsed[name]!r} and {value.strip()!r}")
        parsed[name] = value.strip()
    return parsed


def convert_settings(config_class: type, settings: Mapping[str, str], option: str = "--set") -> dict[str, Any]:
    """Return the values that the texts stand for, by the types of the fields.

    "none" is None where a field may be None. A list is JSON or values separated by commas, a dict is a JSON object (or
    the path of a file, where a field takes one).

    Args:
        config_class: a dataclass, such as `trl.GRPOConfig`.
        settings: text by field.
        option: that the texts were given by, for messages.

    Raises:
        ValueError: in one line, for a field that the class does not have, with near ones, or a text that is no value of
            the field's type.

    >>> from trl import DPOConfig
    >>> convert_settings(DPOConfig, {"loss_type": "sigmoid,sft", "max_length": "none", "learning_rate": "1e-5"})
    {'loss_type': ['sigmoid', 'sft'], 'max_length': None, 'learning_rate': 1e-05}
    """
    # String annotations of a subclass are resolved where it was defined.
    hints = {**typing.get_type_hints(config_class), **_ALL}
    if "GRPOConfig" in {base.__name__ for base in config_class.__mro__}:
        hints |= _GRPO
    check_fields(config_class, settings)
    converted = {}
    for name, text in settings.items():
        try:
            converted[name] = _convert(text, hints[name])
        except ValueError:
            raise ValueError(f"{option} {name}={text}: expected {_describe(hints[name])}") from None
    return converted


def check_fields(config_class: type, names: Iterable[str]) -> None:
    """Raise ValueError for a name that is no field of the class, with the near ones."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    for name in names:
        if name not in fields:
            raise unknown_field(config_class.__name__, fields, name)


def unknown_field(
    config: str, fields: Collection[str], name: str, options: Mapping[str, str] = MappingProxyType({})
) -> ValueError:
    """The error for a name that is none of the `fields` of the class `config`, with the near ones.

    Args:
        options: fields that an option of the command sets, and the option.
    """
    containing = sorted(field for field in fields if name in field)
    near = difflib.get_close_matches(name, sorted(fields), NEAR) or containing[:NEAR]
    near = [f"{field} ({options[field]})" if options.get(field, "").startswith("--") else field for field in near]
    meant = f"; did you mean {', '.join(near)}?" if near else "; its fields are those in TRL's documentation"
    return ValueError(f"{config} has no field {name!r}{meant}")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert(text: str, hint: Any) -> Any:
    """The first type of a union that takes the text; the text itself last."""
    options = _options(hint)
    kinds = [typing.get_origin(option) or option for option in options]
    if type(None) in kinds and text.lower() == "none":
        return None
    structured = text[:1] in ("[", "{") and any(kind in (list, tuple, dict) for kind in kinds)
    for option, kind in zip(options, kinds, strict=True):
        if kind in (str, type(None)):
            continue
        # Beside str, what does not look like JSON is one of several values or the path of a file, and "no" is a word.
        if str in kinds and kind in (list, tuple, dict) and not structured:
            continue
        if str in kinds and kind is bool and text.lower() not in ("true", "false"):
            continue
        try:
            return _convert_one(text, option)
        except ValueError:
            continue
    checked = structured or any(map(_is_enum, kinds)) or (dict in kinds and not os.path.isfile(text))
    if str not in kinds or checked:
        raise ValueError(text)
    return text


def _convert_one(text: str, option: Any) -> Any:
    origin = typing.get_origin(option) or option
    if origin is bool:
        if text.lower() not in TRUE + FALSE:
            raise ValueError(text)
        return text.lower() in TRUE
    if origin is Literal:
        for value in typing.get_args(option):
            if str(value).lower() == text.lower():
                return value
        raise ValueError(text)
    if origin in (list, tuple):
        return _convert_sequence(text, option, origin)
    if origin is dict:
        value = json.loads(text)  # json.JSONDecodeError is a ValueError
        if not isinstance(value, dict):
            raise ValueError(text)
        return value
    if dataclasses.is_dataclass(origin):  # accelerate's ParallelismConfig
        try:
            return origin(**json.loads(text))  # type: ignore[operator]
        except TypeError:
            raise ValueError(text) from None
    if origin is float and text.lower() == "nan":
        raise ValueError(text)
    return origin(text)  # int, float, str, an enum


def _convert_sequence(text: str, option: Any, origin: type) -> Any:
    parts = json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",")]
    kinds = typing.get_args(option)
    if origin is tuple and len(parts) != len(kinds):
        raise ValueError(text)
    kinds = kinds if origin is tuple else kinds * len(parts)
    return origin(_convert(str(part), kind) for part, kind in zip(parts, kinds, strict=True))


def _describe(hint: Any) -> str:
    """What a text for `hint` may be; "text" itself only where nothing else is checked."""
    options = _options(hint)
    checked = [option for option in options if dict in (option, typing.get_origin(option)) or _is_enum(option)]
    described = [_describe_one(option) for option in options if not (option is str and checked)]
    if str in options and checked and not _is_enum(checked[0]):
        described.append("the path of a file")
    return " or ".join(dict.fromkeys(described))


def _describe_one(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if origin is Literal:
        return " or ".join(map(str, typing.get_args(option)))
    if _is_enum(origin):
        return "one of " + ", ".join(str(member.value) for member in origin)
    if origin in (list, tuple):
        return f"a list ({', '.join(map(_describe, typing.get_args(option)))}), in JSON or separated by commas"
    if origin is dict or dataclasses.is_dataclass(origin):
        return "a JSON object"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "none"}[origin]


def _is_enum(option: Any) -> bool:
    return isinstance(option, enum.EnumType)
