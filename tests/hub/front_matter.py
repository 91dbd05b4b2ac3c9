"""What the Hub does with the front matter of a model card: the tags it makes of it, and what it refuses."""

from __future__ import annotations

import re

import yaml

IDENTIFIER = re.compile(r"[\w.-]+(/[\w.-]+)?")


def tags_of(card: dict) -> list[str]:
    """The tags that the Hub shows: the card's own, and those it makes from other fields."""
    tags = [*card.get("tags", [])]
    tags += [card["library_name"]] if "library_name" in card else []
    tags += [f"dataset:{name}" for name in card.get("datasets", [])]
    if base := card.get("base_model"):
        tags += [f"base_model:{base}", f"base_model:{card.get('base_model_relation', 'finetune')}:{base}"]
    return tags


def metadata(card: str) -> dict | None:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def metadata_errors(card: str) -> list[str]:
    """What the Hub would refuse in a model card's front matter."""
    try:
        data = metadata(card)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["empty or missing yaml metadata"]
    errors = []
    for name in ("library_name", "pipeline_tag", "license"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "metrics"):
        if not isinstance(data.get(name, []), list) or not all(isinstance(t, str) for t in data.get(name, [])):
            errors.append(f'"{name}" must be an array of strings')
    for name in [data["base_model"]] if "base_model" in data else []:
        if not isinstance(name, str) or not IDENTIFIER.fullmatch(name):
            errors.append('"base_model" must be the id of a model on the Hub')
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of adapter, finetune, merge, quantized')
    for dataset in data.get("datasets", []):
        if not IDENTIFIER.fullmatch(str(dataset)):
            errors.append('"datasets" must be ids of data sets on the Hub')
    for index in data.get("model-index", []):
        if not isinstance(index.get("name"), str) or not index["name"]:
            errors.append('"model-index[0].name" is required')
        for result in index.get("results", []):
            needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'"{a}.{b}" is required' for a, b in needed if not isinstance(result.get(a, {}).get(b), str)]
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append('"metrics" need a type and a value')
    return errors
