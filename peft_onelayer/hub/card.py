"""The model card: the template of model_cards/ filled from a run's own records, with the front matter for the Hub.

Every figure comes from run.json, an `onelayer eval` file, layer_profile.json or adapter_config.json; what they do not
hold is left out. It writes and reads no file, and knows nothing of paths and secrets: its input has been cleaned.
"""

from __future__ import annotations

import re
import statistics
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from peft_onelayer.records.locate import last_part

if TYPE_CHECKING:
    from peft_onelayer.records.ranking import LayerRanking

EVALUATION_FORMAT = "onelayer-eval-1"
PLOT = "layer_profile.png"
TAGS = ("onelayer", "reinforcement-learning")
# The task of a leaderboard, by data set: the ids that the data set's own eval.yaml declares.
BENCHMARKS = {"openai/gsm8k": "gsm8k"}
_HUB_DATA = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@.*)?")


def model_card(
    config: dict[str, Any] | None,
    run: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    profile: LayerRanking | None = None,
    *,
    repo_id: str | None = None,
    parameters: int | None = None,
    peft_export: str | None = None,
    local_base: bool = False,
) -> str:
    """README.md of an adapter, or of a full-parameter run.

    Args:
        config: the fields of adapter_config.json; None for a full-parameter run, which needs `run`.
        run: run.json.
        evaluation: what `onelayer eval` measured of this adapter.
        profile: the ranking of the layers; it is drawn in `PLOT`.
        repo_id: where on the Hub it goes; without one the card speaks of a folder.
        parameters: number of trained parameters.
        peft_export: the subfolder with the form that loads without this package, if there is one.
        local_base: whether the base's name is that of a folder, so that the Hub knows no model by it.
    """
    facts = _Facts(config or {}, run or {}, local_base)
    template = Template((files("peft_onelayer.model_cards") / "adapter.md").read_text())
    metadata = _metadata(facts, evaluation, repo_id, full=config is None)
    text = template.substitute(
        metadata=metadata.to_yaml(),
        title=_title(facts),
        summary=_summary(facts, full=config is None),
        results=_results(evaluation, run),
        profile=_profile(profile) if profile else "",
        training="\n".join(f"- {line}" for line in _training(facts, parameters)),
        use=_use(facts, repo_id, full=config is None),
        without_plugin=_without_plugin(facts, repo_id, peft_export) if peft_export else "",
        reproduce=_reproduce(run),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def eval_results(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry of `.eval_results/*.yaml`, in percent as leaderboards have it, greedy where that was measured; none for
    data without a leaderboard."""
    decoding = "greedy" if "greedy" in evaluation["results"] else "sampled"
    result = evaluation["results"][decoding]
    error = result["adapter"]["standard_error"]
    entries = [
        EvalResultEntry(
            dataset_id=found["id"],
            task_id=BENCHMARKS[found["id"]],
            value=round(100 * result["adapter"]["mean"], 2),
            dataset_revision=commit,
            notes=f"onelayer eval, {_decoding(decoding, evaluation)}, n = {result['n']}, "
            f"standard error {'not known' if error is None else f'{100 * error:.2f}'}",
        )
        for dataset, commit in evaluation["task"]["data"].items()
        if evaluation["split"] == "test" and (found := _HUB_DATA.fullmatch(dataset)) and found["id"] in BENCHMARKS
    ]
    return eval_result_entries_to_yaml(entries)


class _Facts:
    """What the records say, by its name; None or empty where they say nothing."""

    def __init__(self, config: dict[str, Any], run: dict[str, Any], local_base: bool) -> None:
        settings = run.get("settings", {})
        model = settings.get("model", {})
        data = settings.get("task") or settings.get("dataset") or {}
        self.run, self.settings = run, settings
        self.base: str | None = config.get("base_model_name_or_path") or model.get("name")
        self.base_on_hub = bool(self.base) and not local_base
        if self.base and local_base:
            self.base = last_part(self.base)
        self.revision: str | None = config.get("revision") or model.get("revision")
        self.layers: list[int] | None = config.get("layer_indices") or run.get("layers")
        self.num_layers: int | None = config.get("num_layers") or model.get("num_layers")
        self.parameters: int | None = model.get("parameters")
        self.algorithm: str | None = settings.get("algorithm")
        self.trainer: str | None = settings.get("trainer")
        self.task: str | None = data.get("name")
        self.datasets = [found["id"] for name in data.get("data", {}) if (found := _HUB_DATA.fullmatch(name))]

    @property
    def base_source(self) -> str:
        """What to load the base from."""
        return str(self.base) if self.base_on_hub else f"path/to/{self.base or 'base-model'}"

    @property
    def blocks(self) -> str:
        if not self.layers:
            return "All blocks"
        listed = ", ".join(map(str, sorted(self.layers)))
        return f"Block{'s' if len(self.layers) > 1 else ''} {listed} of {self.num_layers}"


def _metadata(facts: _Facts, evaluation: dict[str, Any] | None, repo_id: str | None, full: bool) -> ModelCardData:
    tags = [*TAGS, facts.algorithm, facts.task, f"task:{facts.task}" if facts.task else None]
    tags += [f"layer:{layer}" for layer in sorted(facts.layers or [])]
    results = _model_index(evaluation) if evaluation else None
    return ModelCardData(
        library_name="transformers" if full else "peft",
        base_model=facts.base if facts.base_on_hub else None,
        base_model_relation=None if not facts.base_on_hub else "finetune" if full else "adapter",
        pipeline_tag="text-generation",
        datasets=facts.datasets or None,
        tags=[tag for tag in tags if tag],
        model_name=(repo_id or "adapter").rpartition("/")[2] if results else None,
        eval_results=results,
    )


def _model_index(evaluation: dict[str, Any]) -> list[EvalResult]:
    task, data = evaluation["task"]["name"], evaluation["task"]["data"]
    found = next((found for name in data if (found := _HUB_DATA.fullmatch(name))), None)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=found["id"] if found else task,
            dataset_name=task,
            dataset_config=found["config"] if found else None,
            dataset_split=evaluation["split"],
            dataset_revision=data[found[0]] if found else None,
            metric_type="mean_reward",
            metric_name=f"mean reward, {_decoding(decoding, evaluation)}",
            metric_value=round(result["adapter"]["mean"], 4),
            metric_args={"n": result["n"], "samples": result["samples"], "standard_error": _error(result["adapter"])},
        )
        for decoding, result in evaluation["results"].items()
    ]


def _title(facts: _Facts) -> str:
    with_what = f", trained with {facts.algorithm}" if facts.algorithm else ""
    on_what = f" on `{facts.task}`" if facts.task else ""
    return facts.blocks + with_what + on_what


def _summary(facts: _Facts, full: bool) -> str:
    base = f"`{facts.base}`" if facts.base else "its base model"
    if facts.base_on_hub:
        base = f"[{facts.base}](https://huggingface.co/{facts.base})"
    if full:
        return f"{base}, trained in full: the baseline for adapters of single blocks."
    block = "block" if len(facts.layers or []) == 1 else "blocks"
    return (
        f"A PEFT adapter of `peft-onelayer`: {block} {', '.join(map(str, sorted(facts.layers or [])))} of {base}, "
        "trained as a whole; every other weight of the base is untouched."
    )


def _results(evaluation: dict[str, Any] | None, run: dict[str, Any] | None) -> str:
    if not evaluation:
        return "No evaluation is recorded here; `onelayer eval` measures it against the base.\n\n"
    lines = ["## Results", "", "| | n | base | adapter | difference |", "|---|---|---|---|---|"]
    for decoding, result in evaluation["results"].items():
        cells = [_figure(result["base"]), _figure(result["adapter"]), _figure(result["difference"], "+")]
        lines.append(f"| {_decoding(decoding, evaluation)} | {result['n']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Mean reward ± its standard error over the n problems of `{evaluation['task']['name']}`, "
        f"{evaluation['split']} split; the difference is paired by problem. Seed {evaluation['seed']}, "
        f"at most {evaluation['max_completion_tokens']} tokens a completion.",
    ]
    if verdict := (run or {}).get("results", {}).get("verdict"):
        lines += ["", verdict]
    return "\n".join(lines) + "\n\n"


def _profile(profile: LayerRanking) -> str:
    pick = f"picked block {profile.pick}" if profile.pick is not None else "found no block that gains"
    share = profile.cost.get("share")
    cost = f", for {share:.0%} of the tokens of the training run" if share is not None else ""
    return (
        f"## Layer profile\n\n![What each block gains]({PLOT})\n\n"
        f"`{profile.method}` on `{profile.task}` {pick} of {profile.num_layers}{cost}. "
        "The figures are in `layer_profile.json`.\n\n"
    )


def _training(facts: _Facts, parameters: int | None) -> list[str]:
    run, settings = facts.run, facts.settings
    why = run.get("why")
    lines = [facts.blocks.lower() + (f": {why}" if why else "")]
    if parameters and facts.parameters:
        share = 100 * parameters / facts.parameters
        lines.append(f"{parameters:,} of {facts.parameters:,} parameters ({share:.1f} %)")
    elif parameters:
        lines.append(f"{parameters:,} parameters")
    if facts.revision:
        lines.append(f"base model at commit {facts.revision}")
    if not run:
        return [*lines, "no record of the training run was published with it"]
    results = run.get("results", {})
    steps = [f"{results['steps']} steps"] if "steps" in results else []
    rate = settings.get("config", {}).get("learning_rate")
    steps += [f"learning rate {rate:g}"] if rate else []
    lines.append(", ".join([f"TRL's `{(facts.trainer or '').rpartition('.')[2]}`", *steps, f"seed {settings['seed']}"]))
    for name in ("reward", "loss"):
        values = results.get({"reward": "rewards", "loss": "losses"}[name])
        if values:
            tenth = max(1, len(values) // 10)
            first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
            lines.append(f"mean {name} {first:.3g} -> {last:.3g} (first and last {tenth} of {len(values)} logs)")
            break
    if facts.task:
        data = (settings.get("task") or settings.get("dataset"))["data"]
        what = ", ".join(f"{name} ({str(version)[:12]})" for name, version in data.items())
        lines.append(f"data: `{facts.task}`" + (f", {what}" if what else ""))
    versions = run.get("machine", {}).get("versions", {})
    if versions:
        lines.append("versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    return [*lines, "all settings: run.json"]


def _use(facts: _Facts, repo_id: str | None, full: bool) -> str:
    where = repo_id or "path/to/this/folder"
    if full:
        return (
            f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{where}")'
        )
    register = "import peft_onelayer  # pip install peft-onelayer; registers the method, else KeyError 'SINGLE_LAYER'\n"
    if repo_id and not facts.base_on_hub:
        return register + _load_on_base(facts, where)
    return (
        f"{register}from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.base_source}")'
    )


def _without_plugin(facts: _Facts, repo_id: str | None, subfolder: str) -> str:
    # not AutoPeftModel, which would look for the base in the subfolder too
    return (
        f"\nWithout this package, plain PEFT loads the same weights from the folder `{subfolder}`:\n\n```python\n"
        + _load_on_base(facts, repo_id or "path/to/this/folder", f', subfolder="{subfolder}"')
        + "\n```\n"
    )


def _load_on_base(facts: _Facts, where: str, options: str = "") -> str:
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{facts.base_source}")\n'
        f'model = PeftModel.from_pretrained(base, "{where}"{options})'
    )


def _reproduce(run: dict[str, Any] | None) -> str:
    return f"\n## Reproduce\n\n```\n{run['command']}\n```\n" if run and run.get("command") else ""


def _decoding(decoding: str, evaluation: dict[str, Any]) -> str:
    if decoding == "greedy":
        return "greedy"
    return f"avg@{evaluation['samples']} at temperature {evaluation['temperature']:g}"


def _figure(figures: dict[str, float | None], sign: str = "") -> str:
    error = figures["standard_error"]
    return f"{figures['mean']:{sign}.4f} ± {'?' if error is None else f'{error:.4f}'}"


def _error(figures: dict[str, float | None]) -> float | None:
    error = figures["standard_error"]
    return None if error is None else round(error, 4)
