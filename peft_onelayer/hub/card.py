"""The model card: the template of model_cards/ filled from a run's own records, with the front matter for the Hub.

Every figure comes from run.json, eval.json, layer_profile.json or adapter_config.json; what they do not hold is left
out. Paths and secrets have to be removed from the records before.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.figures import Figures, Measured, about_watched, with_error
from peft_onelayer.records.files import PROFILE, RUN
from peft_onelayer.records.locate import last_part
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import DataSource, RunRecord
from peft_onelayer.records.text import name_blocks, well_formed
from peft_onelayer.rl.algorithms import ALGORITHMS
from peft_onelayer.tasks import TASKS

from .card_text import TAGS, part

PLOT = "layer_profile.png"
REWARDS = "reward.png"
PAPER = "[Is One Layer Enough?](https://arxiv.org/abs/2607.01232)"
ENGLISH = ("gsm8k", "reasoning_gym", "humaneval", "mbpp", "textworld")  # tasks whose prompts are in English
SHOWN = 1200  # characters of a prompt or a completion in the example
# The task of a leaderboard, by data set: the ids that the data set's own eval.yaml declares.
BENCHMARKS = {"openai/gsm8k": "gsm8k"}
_HUB_DATA = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@.*)?")


def model_card(
    config: dict[str, Any] | None,
    run: RunRecord | None = None,
    evaluation: EvaluationRecord | None = None,
    profile: LayerRanking | None = None,
    *,
    repo_id: str | None = None,
    parameters: int | None = None,
    peft_export: str | None = None,
    local_base: bool = False,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """README.md of an adapter, or of a full-parameter run.

    Args:
        config: the fields of adapter_config.json; None for a full-parameter run, which needs `run`.
        run: run.json.
        evaluation: what `onelayer eval` measured of this adapter.
        profile: the ranking of the blocks.
        repo_id: where on the Hub it goes; without one the card speaks of a folder.
        parameters: number of trained parameters.
        peft_export: the subfolder with the form that loads without this package, if there is one.
        local_base: whether the base's name is that of a folder, so that the Hub knows no model by it.
        license: of the adapter, as the Hub names it.
        pictures: which of `PLOT` and `REWARDS` stand beside the card.
    """
    run = run and run.cleaned()
    base = _Base.of(config, run, local_base)
    template = Template((files("peft_onelayer.model_cards") / "adapter.md").read_text(encoding="utf-8"))
    full = config is None
    chat = run.settings.source.chat if run else evaluation.chat if evaluation else None
    reproduce = f"## Reproduce\n\n```\n{run.command}\n```" if run and run.command else ""
    example = _example(evaluation) if evaluation else ""
    parts = {
        "title": f"# {_title(base, run)}\n\n{_summary(base, run, full)}",
        "results": _results(evaluation, run),
        "example": example,
        "profile": _profile(profile, PLOT in pictures) if profile else "",
        "training": _training_part(base, run, parameters, REWARDS in pictures),
        "use": f"## Use\n\n```python\n{_use(base, repo_id, full, bool(chat))}\n```",
        "without_plugin": _without_plugin(base, repo_id, peft_export) if peft_export else "",
        "reproduce": reproduce,
        "limits": _limits(evaluation, run),
        "links": _links(run),
    }
    text = template.substitute(
        metadata=_metadata(base, run, evaluation, repo_id, full, license).to_yaml(),
        **{name: part(name, text) for name, text in parts.items()},
    )
    return well_formed(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")


def eval_results(evaluation: EvaluationRecord) -> list[dict[str, Any]]:
    """The entry of `.eval_results/*.yaml`, in percent as leaderboards have it, greedy where that was measured; none for
    data without a leaderboard. The evaluation is one of an adapter."""
    decoding = "greedy" if "greedy" in evaluation.results else "sampled"
    result = evaluation.results[decoding]
    figures = _of_adapter(result)
    error = figures.standard_error
    entries = [
        EvalResultEntry(
            dataset_id=found["id"],
            task_id=BENCHMARKS[found["id"]],
            value=round(100 * figures.mean, 2),
            dataset_revision=commit,
            notes=f"onelayer eval, {_decoding(decoding, evaluation)}, n = {result.n}, "
            f"standard error {'not known' if error is None else f'{100 * error:.2f}'}"
            + (f", {result.watched} of these problems chose the step that was kept" if result.watched else ""),
        )
        for found, commit in _hub_data(evaluation.task)
        if evaluation.split == "test" and found["id"] in BENCHMARKS
    ]
    return eval_result_entries_to_yaml(entries)


@dataclass(frozen=True)
class _Base:
    """The base and its trained blocks, by adapter_config.json or else by run.json.

    Attributes:
        name: a Hub id, or the last part of a folder's name; None where nothing names it.
        on_hub: whether it is a Hub id.
        revision: the base's commit.
        layers: the trained blocks; empty where all were trained.
        num_layers: of the base.
    """

    name: str | None
    on_hub: bool
    revision: str | None
    layers: list[int]
    num_layers: int | None

    @classmethod
    def of(cls, config: dict[str, Any] | None, run: RunRecord | None, local: bool) -> _Base:
        config, model = config or {}, run.settings.model if run else None
        name = config.get("base_model_name_or_path") or (model.name if model else None)
        return cls(
            name=last_part(name) if name and local else name,
            on_hub=bool(name) and not local,
            revision=config.get("revision") or (model.revision if model else None),
            layers=config.get("layer_indices") or (run.layers if run else None) or [],
            num_layers=config.get("num_layers") or (model.num_layers if model else None),
        )

    @property
    def source(self) -> str:
        """What to load the base from."""
        return str(self.name) if self.on_hub else f"path/to/{self.name or 'base-model'}"

    @property
    def blocks(self) -> str:
        return f"{name_blocks(self.layers)} of {self.num_layers}" if self.layers else "all blocks"


def _metadata(
    base: _Base,
    run: RunRecord | None,
    evaluation: EvaluationRecord | None,
    repo_id: str | None,
    full: bool,
    license: str | None,
) -> ModelCardData:
    tags, datasets, language = [*TAGS], [], None
    if run:
        source = run.settings.source
        tags.append(run.settings.algorithm)
        if task := _task_tag(source):
            tags += [task, f"task:{task}"]
        datasets = list(dict.fromkeys(found["id"] for found, _ in _hub_data(source, mixed=True)))
        language = "en" if source.name.partition(":")[0] in ENGLISH else None
    tags += [f"layer:{layer}" for layer in sorted(base.layers)]
    results = _model_index(evaluation) if evaluation else None
    return ModelCardData(
        library_name="transformers" if full else "peft",
        base_model=base.name if base.on_hub else None,
        base_model_relation=None if not base.on_hub else "finetune" if full else "adapter",
        pipeline_tag="text-generation",
        datasets=datasets or None,
        language=language,
        license=license,
        tags=tags,
        model_name=(repo_id or "adapter").rpartition("/")[2] if results else None,
        eval_results=results,
    )


def _hub_data(source: DataSource, mixed: bool = False) -> list[tuple[re.Match[str], str]]:
    """The data sets of the Hub among what was read, each with its commit. A file, whatever its name, has a digest.

    Args:
        mixed: those of a mixture's tasks too, whose names stand before theirs.
    """
    names = [(name.rpartition(" ")[2] if mixed else name, version) for name, version in source.data.items()]
    return [
        (found, version)
        for name, version in names
        if not version.startswith("sha256:") and (found := _HUB_DATA.fullmatch(name))
    ]


def _task_tag(source: DataSource) -> str | None:
    """The task as others know it; None for data of one's own, and a task that read some is named without the file."""
    parts = [part.partition(":")[0] for part in source.name.split("+")]
    if all(part in TASKS or part.endswith(".py") for part in parts):
        own = any(version.startswith("sha256:") and not name.endswith(".py") for name, version in source.data.items())
        return "+".join(parts) if own else source.name
    asked = source.name.partition("@")[0].partition(":")[0]
    return source.name if any(asked == found["id"] for found, _ in _hub_data(source)) else None


def _model_index(evaluation: EvaluationRecord) -> list[EvalResult]:
    task = evaluation.task
    found, commit = next(iter(_hub_data(task)), (None, None))
    results = []
    for decoding, result in evaluation.results.items():
        figures = _of_adapter(result)
        error = figures.standard_error
        args = {"n": result.n, "samples": result.samples, "standard_error": None if error is None else round(error, 4)}
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=found["id"] if found else task.name,
                dataset_name=task.name,
                dataset_config=found["config"] if found else None,
                dataset_split=evaluation.split,
                dataset_revision=commit,
                metric_type="mean_reward",
                metric_name=f"mean reward, {_decoding(decoding, evaluation)}",
                metric_value=round(figures.mean, 4),
                metric_args=args,
            )
        )
    return results


def _title(base: _Base, run: RunRecord | None) -> str:
    title = base.blocks[0].upper() + base.blocks[1:]
    title = f"{last_part(base.name)}: {base.blocks}" if base.name else title
    return f"{title}, trained with {run.settings.algorithm} on `{run.settings.source.name}`" if run else title


def _summary(base: _Base, run: RunRecord | None, full: bool) -> str:
    movement = run.results.movement if run and run.results else None
    moved = f" What moved: {movement.summary()}." if movement else ""
    name = f"`{base.name}`" if base.name else "its base model"
    if base.on_hub:
        name = f"[{base.name}](https://huggingface.co/{base.name})"
    if full:
        return f"{name}, trained in full: the baseline for adapters of single blocks.{moved}"
    return (
        f"A PEFT adapter of `peft-onelayer`: {name_blocks(base.layers)} of {name}, trained as a whole; every other "
        f"weight of the base is untouched.{moved}"
    )


def _results(evaluation: EvaluationRecord | None, run: RunRecord | None) -> str:
    if not evaluation:
        return _held_out(run) or "No evaluation is recorded here; `onelayer eval` measures it against the base."
    lines = ["## Results", "", "| | n | base | adapter | difference |", "|---|---|---|---|---|"]
    for decoding, result in evaluation.results.items():
        lines.append(_row(_decoding(decoding, evaluation), result))
    lines += [
        "",
        f"Mean reward ± its standard error over the n problems of `{evaluation.task.name}`, "
        f"{evaluation.split} split; the difference is paired by problem. Seed {evaluation.seed}, "
        f"at most {evaluation.max_completion_tokens} tokens a completion.",
    ]
    lines += _about_watched(evaluation, evaluation.results)
    if evaluation.also:
        lines += [
            "",
            "Other tasks, before and after:",
            "",
            "| | | n | base | adapter | difference |",
            "|---|" + "---|" * 5,
        ]
        for task, results in evaluation.also.items():
            lines += [
                _row(f"{task} | {_decoding(decoding, evaluation)}", result) for decoding, result in results.items()
            ]
        for task, results in evaluation.also.items():
            lines += _about_watched(evaluation, results, f"{task}: ")
    if run and run.results and run.results.verdict:
        lines += ["", f"At the end of training: {run.results.verdict}."]
    if not evaluation.also and run and run.results and run.results.also:
        lines += ["", *_also(run.results.also)]
    return "\n".join(lines) + "\n\n"


def _about_watched(evaluation: EvaluationRecord, results: dict[str, Measured], where: str = "") -> list[str]:
    said = about_watched({_decoding(decoding, evaluation): result for decoding, result in results.items()})
    return ["", where + said] if said else []


def _held_out(run: RunRecord | None) -> str:
    """What the run itself measured; "" where it measured nothing."""
    results = run.results if run else None
    if run is None or results is None or not (results.held_out or results.also):
        return ""
    lines = ["## Results", ""]
    if results.held_out:
        lines += ["| | n | base | adapter | difference |", "|---|---|---|---|---|"]
        lines += [_row(run.settings.source.name, results.held_out), ""]
        lines += [
            f"Mean reward ± its standard error over n held-out problems, {results.held_out.samples} samples of each, "
            "measured by the run itself; the difference is paired by problem.",
            "",
        ]
    if results.verdict:
        lines += [f"At the end of training: {results.verdict}.", ""]
    return "\n".join([*lines, *_also(results.also or {})]).rstrip() + "\n\n"


def _also(also: dict[str, Measured]) -> list[str]:
    """The lines on other tasks that the run measured."""
    if not also:
        return []
    header = ["Other tasks, before and after:", "", "| | n | base | adapter | difference |", "|---|---|---|---|---|"]
    return [*header, *(_row(task, result) for task, result in also.items())]


def _row(name: str, result: Measured) -> str:
    assert result.difference is not None
    cells = [with_error(result.base), with_error(_of_adapter(result)), with_error(result.difference, "+")]
    return f"| {name} | {result.n} | " + " | ".join(cells) + " |"


def _example(evaluation: EvaluationRecord) -> str:
    """The first problem with what base and adapter wrote; "" for data that nobody has published."""
    public = evaluation.task.name.partition(":")[0] in TASKS or len(_hub_data(evaluation.task)) == len(
        evaluation.task.data
    )
    found = next(iter(evaluation.examples or []), None)
    if found is None or not public:
        return ""
    lines = ["## Example", "", f"The first problem of the evaluation, {found.decoding} completions:"]
    for name, text, reward in (
        ("prompt", found.prompt, None),
        ("base", found.base, found.base_reward),
        ("adapter", found.adapter or "", found.adapter_reward),
    ):
        worth = "" if reward is None else f" (reward {reward:g})"
        lines += ["", f"**{name}**{worth}", "", *(f"    {line}" for line in text[:SHOWN].splitlines() or [""])]
    return "\n".join(lines)


def _limits(evaluation: EvaluationRecord | None, run: RunRecord | None) -> str:
    lines = ["## Limits", ""]
    if evaluation:
        lines.append(
            f"- Measured on {evaluation.n} problems of `{evaluation.task.name}`; other abilities may have changed."
        )
    else:
        lines.append("- Nothing was measured after training but what stands above.")
    if run:
        lines.append("- One run with one seed: another seed gives other weights, and another gain.")
    return "\n".join([*lines, "- What the base model cannot do, or should not be used for, holds for it too."])


def _links(run: RunRecord | None) -> str:
    lines = ["## Links", "", f"- The method: {PAPER} (arXiv 2607.01232), with `peft-onelayer`, a method of "]
    lines[-1] += "[PEFT](https://github.com/huggingface/peft)."
    algorithm = ALGORITHMS.get(run.settings.algorithm) if run else None
    if run and algorithm:
        paper = f"[arXiv {algorithm.source}](https://arxiv.org/abs/{algorithm.source})"
        lines.append(f"- The algorithm: `{algorithm.name}`, {paper}, in [TRL](https://github.com/huggingface/trl).")
    return "\n".join(lines)


def _profile(profile: LayerRanking, drawn: bool) -> str:
    pick = f"picked block {profile.pick}" if profile.pick is not None else "found no block that gains"
    share = profile.cost.get("share")
    cost = ""
    if share is not None and share <= 1:
        cost = f", for {share:.0%} of the tokens of the training run"
    elif share is not None:
        cost = f", for {share:.1f} times the tokens of one training run"
    return (
        "## Layer profile\n\n"
        + (f"![What each block gains]({PLOT})\n\n" if drawn else "")
        + f"`{profile.method}` on `{profile.task}` {pick} of {profile.num_layers}{cost}. "
        f"The figures are in `{PROFILE}`."
    )


def _training_part(base: _Base, run: RunRecord | None, parameters: int | None, drawn: bool) -> str:
    lines = "\n".join(f"- {line}" for line in _training(base, run, parameters))
    picture = f"\n\n![Mean reward of every step]({REWARDS})" if drawn else ""
    return f"## What was trained\n\n{lines}{picture}"


def _training(base: _Base, run: RunRecord | None, parameters: int | None) -> list[str]:
    lines = [base.blocks]
    if run and run.why:
        lines = [f"{base.blocks}:", *(f"  - {reason}" for reason in run.why.split("; "))]
        lines = ["\n".join(lines)]
    whole = run.settings.model.parameters if run else 0
    if parameters and whole:
        lines.append(f"{parameters:,} of {whole:,} parameters ({100 * parameters / whole:.1f} %)")
    elif parameters:
        lines.append(f"{parameters:,} parameters")
    if base.revision:
        lines.append(f"base model at commit {base.revision}")
    if not run:
        return [*lines, "no record of the training run was published with it"]
    settings, results = run.settings, run.results
    how = [f"TRL's `{settings.trainer.rpartition('.')[2]}`"]
    how += [f"{results.steps} steps"] if results else []
    rate = settings.config.get("learning_rate")
    how += [f"learning rate {rate:g}"] if isinstance(rate, (int, float)) else []
    lines.append(", ".join([*how, f"seed {settings.seed}"]))
    if results and (results.rewards or results.losses):
        name, values = ("reward", results.rewards) if results.rewards else ("loss", results.losses)
        tenth = max(1, len(values) // 10)
        first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
        lines.append(f"mean {name} {first:.3g} -> {last:.3g} (first and last {tenth} of {len(values)} logs)")
    data = ", ".join(f"{name} ({version[:12]})" for name, version in settings.source.data.items())
    lines.append(f"data: `{settings.source.name}`" + (f", {data}" if data else ""))
    device = run.machine.get("device")
    took = f"{results.seconds:.0f} s" if results and results.seconds else ""
    if took or device:
        lines.append("hardware: " + ", ".join(filter(None, [str(device or ""), took])))
    versions = run.machine.get("versions")
    if isinstance(versions, dict):
        lines.append("versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    return [*lines, f"all settings: {RUN}"]


def _use(base: _Base, repo_id: str | None, full: bool, chat: bool) -> str:
    where = repo_id or "path/to/this/folder"
    register = "import peft_onelayer  # pip install peft-onelayer; registers the method, else KeyError 'SINGLE_LAYER'\n"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{where if full else base.source}")'
    prompt = 'inputs = tokenizer("Your prompt", return_tensors="pt")'
    if chat:
        prompt = (
            'messages = [{"role": "user", "content": "Your prompt"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    generate = (
        f"{tokenizer}\n\n{prompt}\n"
        "output = model.generate(**inputs, max_new_tokens=256)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if full:
        return f'{imports}\nmodel = AutoModelForCausalLM.from_pretrained("{where}")\n{generate}'
    if repo_id and not base.on_hub:
        loaded = _load_on_base(base, where).replace("ForCausalLM\n", "ForCausalLM, AutoTokenizer\n", 1)
        return f"{register}{loaded}\n{generate}"
    return (
        f"{register}from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{where}")\n{generate}'
    )


def _without_plugin(base: _Base, repo_id: str | None, subfolder: str) -> str:
    # not AutoPeftModel, which would look for the base in the subfolder too
    return (
        f"Without this package, plain PEFT loads the same weights from the folder `{subfolder}`:\n\n```python\n"
        + _load_on_base(base, repo_id or "path/to/this/folder", f', subfolder="{subfolder}"')
        + "\n```"
    )


def _load_on_base(base: _Base, where: str, options: str = "") -> str:
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base.source}")\n'
        f'model = PeftModel.from_pretrained(base, "{where}"{options})'
    )


def _of_adapter(result: Measured) -> Figures:
    assert result.adapter is not None  # `EvaluationRecord.from_dict` refuses an adapter's evaluation without it
    return result.adapter


def _decoding(decoding: str, evaluation: EvaluationRecord) -> str:
    if decoding == "greedy":
        return "greedy"
    return f"avg@{evaluation.samples} at temperature {evaluation.temperature:g}"
