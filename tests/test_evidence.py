"""What is run as evidence, in which order, what its tasks hold out, and what its page says; nothing is trained here."""

import doctest
import json
import random
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import models
from peft_onelayer.records.jsonl import read_records
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.sweep.metric import layer_contribution
from peft_onelayer.tasks import load_task

EVIDENCE = Path(__file__).parents[1] / "examples" / "evidence"
VERSIONS = {"versions": {"peft": "1", "trl": "2", "transformers": "3", "torch": "4"}, "device": "cpu", "machine": "m"}


@pytest.fixture
def evidence(monkeypatch):
    """The module `evidence`, with the others beside it as attributes."""
    monkeypatch.syspath_prepend(str(EVIDENCE))
    before = set(sys.modules)
    import changes_page
    import early
    import evidence
    import figures
    import measures
    import one_run
    import page
    import planned
    import rl_changes
    import transplant
    import words

    for module in (rl_changes, changes_page, early, figures, measures, one_run, page, planned, transplant, words):
        setattr(evidence, module.__name__, module)
    yield evidence
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == EVIDENCE:
            del sys.modules[name]


def row(setting, run, score):
    return {"setting": asdict(setting), "run": asdict(run), "search_mean": score}


def full_row(setting, run, level=None):
    """A row whose scores follow from the run: a block's from its depth, full above, the base below."""
    if level is None:
        level = {"base": 0.2, "full": 0.6}.get(run.kind, 0.3)
        level += 0.2 * (1 - abs(run.block - 12) / 30) if run.block is not None else 0
    generator = random.Random(str(run))
    common = random.Random(0)
    scores = [
        min(1.0, max(0.0, level + common.gauss(0, 0.1) + generator.gauss(0, 0.05))) for _ in range(setting.problems)
    ]
    mean = sum(scores) / len(scores)
    made = {"format": "onelayer-evidence-1", "setting": asdict(setting), "run": asdict(run), "scores": scores}
    made |= {"rewards": [level] * setting.steps}
    made |= {"mean": mean, "standard_error": 0.01, "parameters": 1000, "cpu_seconds": 36.0, "seconds": 40.0}
    made |= {"versions": VERSIONS}
    return made | ({"search_mean": 0.5 - abs((run.rate or 0) - 1e-4)} if run.searched else {})


def whole(evidence, setting):
    """All rows of a study."""
    rows = []
    while missing := [
        r for r in dict.fromkeys(evidence.runs(setting, rows)) if not any(evidence.same(r, x) for x in rows)
    ]:
        rows += [full_row(setting, run) for run in missing]
    return rows


def probe_row(setting, probe, pick):
    scores = [float(k == pick) for k in range(30)]
    ranking = LayerRanking(
        model=setting.model,
        revision=None,
        num_layers=30,
        method=probe["method"],
        scores=scores,
        errors=[0.1] * 30,
        order=sorted(range(30), key=lambda k: -scores[k]),
        tied=[pick],
        pick=pick,
        learning_rate=None,
        cost={"tokens_generated": 1, "tokens_trained": 1, "seconds": 1.0, "share": 0.25},
        task="sums",
        seed=probe["seed"],
    )
    return {"probe": probe, "ranking": ranking.to_dict(), "seconds": 2.0, "cpu_seconds": 2.0, "versions": VERSIONS}


def kept_row(setting, run, nats):
    other = {"task": "repeated", "mean": 0.4, "standard_error": 0.01, "scores": [0.4] * 4}
    kept = {"text": {"nats": [nats * 10, nats * 21], "tokens": [10, 20]}, "other": other}
    return full_row(setting, run) | {"retention": kept}


def test_blocks_are_named_when_their_rate_is_chosen_and_spread_over_the_depth(evidence):
    setting = evidence.SETTINGS[0]
    first = list(evidence.runs(setting, []))
    assert str(first[0]) == "base" and not any(run.kind == "block" and run.block != 15 for run in first)
    searched = [run for run in first if run.kind == "block"]
    assert [run.rate for run in searched] == list(setting.rates)
    rows = [row(setting, run, {1e-4: 0.5, 3e-4: 0.5}.get(run.rate, 0.2)) for run in searched]
    best_rate = evidence.planned.best_rate
    assert best_rate(rows[:-1], "block") is None and best_rate(rows, "block") == 1e-4
    blocks = [run for run in evidence.runs(setting, rows) if run.kind == "block" and run not in searched]
    assert [run.block for run in blocks] == [0, 3, 6, 9, 12, 18, 21, 24, 27, 29]
    assert {run.rate for run in blocks} == {1e-4}
    rows += [row(setting, run, 0.4 - run.rate) for run in first if run.kind == "full"]
    planned = list(dict.fromkeys(evidence.runs(setting, rows)))
    for seed in evidence.planned.SEEDS:
        assert sorted(run.block for run in planned if run.kind == "block" and (run.rate, run.seed) == (1e-4, seed)) == [
            *range(30)
        ]
    assert {run.rate for run in planned if run.kind == "full" and run.seed == 1} == {1e-5, 1e-4}


def test_what_is_compared_comes_behind_the_first_sweep_and_before_the_second_seed(evidence):
    setting = evidence.SETTINGS[0]
    rows = whole(evidence, setting)
    planned = list(dict.fromkeys(evidence.runs(setting, rows)))
    swept = max(i for i, run in enumerate(planned) if run.kind == "block" and run.seed == 0)
    again = min(i for i, run in enumerate(planned) if run.seed == 1)
    best = evidence.planned.best_block(rows, setting)
    for kind in evidence.planned.COMPARED:
        grid = setting.rates if kind == "mask" else setting.lora_rates
        first = [run for run in planned if run.kind == kind and run.searched]
        assert [run.rate for run in first] == list(grid)  # as many as for blocks and for all parameters
        assert all(swept < planned.index(run) < again for run in first)
        chosen = [run for run in planned if run.kind == kind and run.rate == evidence.planned.best_rate(rows, kind)]
        assert {(run.block, run.seed) for run in chosen} == {
            (k, seed) for k in ((15, best) if kind == "lora-block" else (None,)) for seed in (0, 1)
        }
    assert best == 12 and evidence.planned.best_block(rows[:20], setting) is None
    assert len(planned) == len(rows)


def test_the_blocks_that_each_study_aims_at(evidence):
    aimed = {s.name: evidence.planned.aimed(s) for s in evidence.SETTINGS}
    assert aimed["smollm2-135m-sums"] == [*range(30)]
    assert aimed["smollm2-135m-repeated"] == sorted({*range(0, 30, 2), 15, 29})
    assert aimed["qwen2.5-coder-0.5b-repeated"] == [0, 3, 6, 9, 12, 15, 18, 21, 23]


@pytest.mark.parametrize(
    "kind, trained",
    [
        ("block", "a block"),
        ("norms", "the norms of all"),
        ("mask", "as many entries as a block has"),
        ("lora-all-sized", "about a block's size"),
        ("lora-block", "two factors for each linear"),
    ],
)
def test_what_each_kind_trains(evidence, tmp_path, kind, trained):
    model = models.build("Llama", num_layers=4)
    block = sum(p.numel() for p in models.block_parameters(model, 1).values())
    linears = [p for name, p in models.block_parameters(model, 1).items() if p.dim() == 2]
    run = evidence.one_run.Run(kind, 1 if kind in ("block", "lora-block") else None, 1e-3)
    config = evidence.one_run.peft_config(run, model, tmp_path)
    counted = sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
    if kind == "lora-all-sized":
        a_rank = 4 * sum(sum(p.shape) for p in linears)
        assert counted % a_rank == 0 and abs(counted - block) <= a_rank / 2
    else:
        expected = {
            "block": block,
            "mask": block,
            "norms": 4 * 2 * 32,
            "lora-block": 16 * sum(sum(p.shape) for p in linears),
        }
        assert counted == expected[kind], trained


def test_a_random_mask_is_of_all_blocks_and_of_its_seed(evidence, tmp_path):
    model = models.build("Llama", num_layers=4)
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evidence.one_run.random_mask(model, seed, tmp_path / name)
        drawn.append(load_file(tmp_path / name))
    names = {name for name, _ in model.named_parameters() if ".layers." in name}
    assert set(drawn[0]) <= names and {name.split(".")[2] for name in drawn[0]} == {"0", "1", "2", "3"}
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(name not in drawn[2] or not torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    block = sum(p.numel() for p in models.block_parameters(model, 0).values())
    assert [sum(int(mask.sum()) for mask in of.values()) for of in drawn] == [block] * 3


@pytest.mark.parametrize("name", ["sums", "repeated"])
def test_no_problem_of_the_test_split_is_trained_on(name):
    task = load_task(str(EVIDENCE / f"{name}.py"))
    asked = {split: {r["prompt"].rpartition("\n")[2] for r in task.rows(split, 400, 0)} for split in ("train", "test")}
    assert not asked["train"] & asked["test"] and min(map(len, asked.values())) > 300
    (problem,) = task.rows("test", 1, 0)
    right = f" {problem['answer']}\n"
    assert task.reward(prompts=[problem["prompt"]] * 2, completions=[right, " no"], answer=[problem["answer"]] * 2) == [
        1.0,
        0.0,
    ]


def test_the_rows_in_the_repository_are_of_planned_runs(evidence):
    for setting in evidence.SETTINGS:
        for found in read_records(evidence.RESULTS / f"{setting.name}.jsonl"):
            assert {**found["setting"], "rates": 0, "lora_rates": 0} == {**asdict(setting), "rates": 0, "lora_rates": 0}
            assert len(found["scores"]) == setting.problems
            assert found["mean"] == pytest.approx(sum(found["scores"]) / setting.problems, abs=1e-12)


def test_the_page_is_what_the_rows_say(evidence):
    for path, text in evidence.page.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python examples/evidence/page.py"


@pytest.fixture
def written(evidence, tmp_path):
    """Writes rows into a folder of results and gives (page, drawings) from them."""

    def write(setting, rows, **more):
        for end, records in {"": rows, **{f"-{name}": found for name, found in more.items()}}.items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / f"{setting.name}{end}.jsonl").write_text(text)
        texts = evidence.page.pages(tmp_path, tmp_path / "evidence.md")
        return texts.pop(tmp_path / "evidence.md"), {path.name: text for path, text in texts.items()}

    return write


def sentences(page):
    """Of the answer: a full stop, and what follows it, ends one."""
    answer = page.partition("## The answer\n\n")[2].partition("\n\n")[0]
    return re.split(r"(?<=\.) (?=[A-Z])", answer)


def test_a_page_of_a_few_rows_says_what_is_missing_by_name(evidence, written):
    setting = evidence.SETTINGS[0]
    rows = whole(evidence, setting)
    page, drawings = written(setting, rows[:3])
    assert not drawings and len(sentences(page)) == 2
    assert "No contribution of a block can be given yet: of the runs there are 3 of " in page
    assert "the searches for" not in page and "each block that is aimed at, seed 0 (blocks 0-29)" in sentences(page)[1]
    assert "the repeated word: everything" in sentences(page)[1]
    assert "| the search for the rate of a block | 2 of 5 | 0.0001, 0.0003, 0.001 |" in page
    assert "nothing was measured" in page and "complete." not in page.replace("incomplete.", "")


def test_several_runs_are_made_at_a_time_and_one_that_fails_takes_none_along(evidence, tmp_path, capsys):
    path, there = tmp_path / "rows.jsonl", lambda one, row: one == {"run": row["run"]}
    wanted = [{"run": 0}, 5, {"run": 1}, {"run": 2}]
    make = partial(dict, seconds=1.0)
    failed = evidence.collect(path, lambda: wanted, there, make, float("inf"), 2)
    assert failed == ["5: TypeError: 'int' object is not iterable"] and "5 failed: TypeError" in capsys.readouterr().out
    assert sorted(row["run"] for row in read_records(path)) == [0, 1, 2]
    wanted.append({"run": 3})
    assert evidence.collect(path, lambda: wanted[2:], there, make, float("inf"), 1) == []
    assert [row["run"] for row in read_records(path)][3:] == [3]
    assert evidence.collect(path, lambda: [{"run": 4}], there, make, -1.0, 1) == [] and len(read_records(path)) == 4


def test_runs_of_another_machine_stand_beside_their_rows(evidence, written):
    setting = evidence.SETTINGS[0]
    rows = whole(evidence, setting)[:3]
    again = [{**rows[0], "scores": [min(1.0, s + 0.001) for s in rows[0]["scores"]], "mean": rows[0]["mean"] + 0.001}]
    again.append({**rows[1], "mean": rows[1]["mean"] + 0.1})
    page, _ = written(setting, rows, repeats=again)
    told = [line for line in page.splitlines() if line.endswith(("| yes |", "| no |"))]
    assert len(told) == 2 and told[0].startswith("| base |") and told[0].endswith("| yes |")
    assert told[1].startswith("| block 15, rate 1e-05, seed 0 |") and told[1].endswith("| no |")


def test_a_partial_profile_is_shown_as_one(evidence, written):
    setting = evidence.SETTINGS[0]
    some = (0, 3, 15)
    rows = [r for r in whole(evidence, setting) if r["run"]["block"] in (None, *some) and r["run"]["seed"] == 0]
    page, drawings = written(setting, rows)
    (svg,) = drawings.values()
    assert f"{evidence.words.MODELS[setting.model]}, {evidence.words.TASKS['sums']}: 3 of 30 blocks" in svg
    assert svg.count("not measured</title>") == 27 and svg.count("<circle") == 3 and "not measured, 27 of 30" in svg
    assert "Blocks not measured: 1-2, 4-14, 16-29." in page
    assert page.count(" | none | not measured |") >= 27
    assert "Of the 3 of 30 blocks that were measured, 15 has the highest C" in sentences(page)[1]
    assert "which flatters it" in sentences(page)[1] and "(one seed)" in sentences(page)[0]
    assert len(sentences(page)) <= 5 and "seed 0 (blocks 1-2, 4-14, 16-29)" in sentences(page)[-1]
    assert "LoRA on the best block | 0 of 2" in page


def test_a_whole_study_has_every_figure_from_its_rows(evidence, written):
    setting = evidence.SETTINGS[0]
    rows = whole(evidence, setting)
    probes = [probe_row(setting, probe, 12 if probe["seed"] else 15) for probe in evidence.measures.probe_runs(setting)]
    kept = [
        kept_row(setting, run, 2.0 if run.kind == "base" else 2.5)
        for run in evidence.measures.retention_runs(setting, rows)
    ]
    alone = [{"kind": "single", "blocks": [k], "scores": [0.3, 0.4 + k / 100], "case": setting.name} for k in range(30)]
    ends = [
        {"kind": kind, "blocks": [], "scores": s, "case": ""}
        for kind, s in (("base", [0.2, 0.4]), ("full", [0.5, 0.9]))
    ]
    page, drawings = written(setting, rows, probes=probes, retention=kept, transplant=[*ends, *alone])
    assert "sums of two-digit numbers**: complete." in page and "Every block was measured." in page
    section = page.partition("## SmolLM2-135M-Instruct, sums")[2].partition("\n## ")[0]
    assert "not measured" not in section and "not yet" not in section
    assert len(sentences(page)) <= 5
    (svg,) = drawings.values()
    assert svg.count("<circle") == 30 and "not measured" not in svg and "all 30 blocks" in svg

    def scores(kind, block, rate):
        found = [r for r in rows if (r["run"]["kind"], r["run"]["block"], r["run"]["rate"]) == (kind, block, rate)]
        return [r["scores"] for r in found]

    base, rate = scores("base", None, None)[0], evidence.planned.best_rate(rows, "block")
    full = scores("full", None, evidence.planned.best_rate(rows, "full"))
    for k in range(30):
        c = layer_contribution(scores("block", k, rate), base, full)
        half = 1.959964 * c.standard_error
        said = f"{c.value:.2f} [{c.value - half:.2f}, {c.value + half:.2f}]"
        assert re.search(rf"^\| {k} \| 0, 1 \| .*\| {re.escape(said)} \|$", section, re.MULTILINE), k
    assert re.search(r"^\| auto \| 25% \| 24 steps \| 5 \| 15, 12, 12, 12, 12 \| ", section, re.MULTILINE)
    assert re.search(r"^\| all parameters \| 1,000 \| .*\| 1 \|$", section, re.MULTILINE)
    assert "it takes the blocks for independent, which neighbours are not, and holds no noise of problems" in page
    assert "| block 15 | 0 |" in section and "+0.5125 ± 0.0125 |" in section  # 2.5 of 2, 2.625 of 2.1


def test_the_answer_says_whose_seeds_and_judges_nothing_at_the_ceiling(evidence, written):
    first, second = evidence.SETTINGS[:2]
    written(first, whole(evidence, first))
    rows = [r for r in whole(evidence, second) if r["run"]["seed"] == 0]
    for reached, said in (
        (0.96, "(one seed): at the ceiling (full training scores 0.960)."),
        (0.94, "(one seed): less than full training."),
    ):
        full = [r for r in rows if r["run"]["kind"] == "full"]
        for r in full:
            r["mean"] = reached
        page, _ = written(second, rows)
        (elsewhere,) = [s for s in sentences(page) if s.startswith("Elsewhere: on SmolLM2-135M-Instruct, the repeated")]
        assert elsewhere.endswith(said)
    assert "(seeds 0, 1): less than full training." in sentences(page)[0]


def test_the_blocks_that_are_not_told_apart_go_by_the_seeds_of_all(evidence, written):
    setting = evidence.SETTINGS[0]
    rows = whole(evidence, setting)
    rate = evidence.planned.best_rate(rows, "block")
    level = {(12, 0): 0.9, (12, 1): 0.9, (3, 0): 0.8, (3, 1): 0.9, (4, 0): 0.45, (4, 1): 0.95}
    for r in rows:
        if r["run"]["kind"] == "block" and r["run"]["rate"] == rate:
            r["mean"] = level.get((r["run"]["block"], r["run"]["seed"]), 0.3)
            r["scores"] = [r["mean"]] * setting.problems
    # (.1**2 + .5**2) / 2 / 30 = .0043 for a run and as much for a difference of two means of two: the bound is .129
    assert evidence.figures.Study(setting, rows).tied() == [12, 3]
    page, _ = written(setting, rows)
    assert "Not told apart from the best of those that were measured: 3, 12 (95 %, paired" in page
    assert "of 30 blocks, 2 are not told apart from the best (3, 12)." in sentences(page)[1]


def test_a_block_that_a_ranking_chose_is_measured_and_is_not_the_best_of_a_sweep(evidence, written):
    setting = evidence.SETTINGS[1]
    rows = whole(evidence, setting)
    probes = [probe_row(setting, probe, 13) for probe in evidence.measures.probe_runs(setting)[:3]]
    chosen = [run for run in dict.fromkeys(evidence.runs(setting, rows, probes)) if run.block == 13]
    assert [(run.kind, run.seed) for run in chosen] == [("block", 0), ("block", 1)]
    page, _ = written(setting, rows, probes=probes)
    assert "| each other block that a ranking chose | 0 of 2 | block 13, seed 0; block 13, seed 1 |" in page
    assert "| prior | 0% | 24 steps | 1 | 13 | not measured yet |" in page
    some = [probe_row(setting, probe, 12) for probe in evidence.measures.probe_runs(setting)[3:4]]
    page, _ = written(setting, rows, probes=[probes[1], *some])
    assert "| auto | 25% | 24 steps | 2 | 13, 12 | not measured yet |" in page  # no mean of those that were
    rows += [full_row(setting, run, 0.58) for run in chosen]
    page, _ = written(setting, rows, probes=probes)
    assert "| each other block that a ranking chose | 2 of 2 |  |" in page
    assert "| prior | 0% | 24 steps | 1 | 13 | 1.00 | 1.00 | 1.00 |" in page
    assert evidence.planned.best_block(rows, setting) == 12
    assert list(dict.fromkeys(evidence.runs(setting, rows, probes[:1]))) == list(
        dict.fromkeys(evidence.runs(setting, rows, probes))
    )
    assert "block 12 of seed 0 has C" in page and "block 13 of seed" not in page


def test_what_is_written_by_hand_is_kept(evidence, tmp_path):
    page = tmp_path / "evidence.md"
    (first,) = evidence.page.pages(tmp_path, page).values()
    page.write_text(first.replace(evidence.page.BEGIN, evidence.page.BEGIN + "\nThe first runs were lost.\n\n- Twice."))
    (again,) = evidence.page.pages(tmp_path, page).values()
    assert "The first runs were lost.\n\n- Twice.\n" + evidence.page.END in again
    page.write_text(again)
    assert evidence.page.pages(tmp_path, page) == {page: again}


@pytest.mark.parametrize(
    "text, fields",
    [
        ("block 15, rate 1e-4, seed 0", ("block", 15, 1e-4, 0)),
        ("lora-all, rate 0.001, seed 1", ("lora-all", None, 1e-3, 1)),
        ("base", ("base", None, None, 0)),
    ],
)
def test_a_run_by_its_name(evidence, text, fields):
    run = evidence.parse_run(text)
    assert (run.kind, run.block, run.rate, run.seed) == fields and evidence.parse_run(str(run)) == run


@pytest.mark.parametrize("text", ["", "block fifteen", "block 15 rate 1e-4", "block 15, seed 0, rate 1e-4"])
def test_what_names_no_run(evidence, text):
    with pytest.raises(ValueError, match="names no run; expected such as 'block 15, rate 1e-4, seed 0'"):
        evidence.parse_run(text)


def test_a_row_again(evidence, monkeypatch, tmp_path, capsys):
    setting = evidence.SETTINGS[0]
    run = evidence.one_run.Run("block", 15, 1e-4)
    kept = full_row(setting, run, 0.5) | {"standard_error": 0.02}
    asked = []
    for level, inside in ((0.5, True), (0.6, False)):
        again = full_row(setting, run, level)
        monkeypatch.setattr(evidence, "execute", lambda *given, again=again: asked.append(given) or again)
        assert evidence.repeat(setting, [kept], "block 15, rate 1e-4, seed 0", tmp_path) is inside
        out = capsys.readouterr().out
        low, high = kept["mean"] - 1.959964 * 0.02, kept["mean"] + 1.959964 * 0.02
        word = "within" if inside else "OUTSIDE"
        assert f"{again['mean']:.4f}, {word} the row's {kept['mean']:.4f} [{low:.4f}, {high:.4f}]" in out
        assert f"{256 if inside else 0} of 256 problems scored the same" in out or not inside
    assert asked[0] == (setting, run, tmp_path) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"no row of block 3, rate 0.0001, seed 0; the rows are: block 15, rate"):
        evidence.repeat(setting, [kept], "block 3, rate 1e-4", tmp_path)


def test_a_transplant_profile_against_the_truth(evidence):
    base, truth = [0.2, 0.4, 0.3], [0.1, 0.4, 0.2, 0.3]
    rows = [{"kind": "base", "blocks": [], "scores": base}, {"kind": "full", "blocks": [], "scores": [0.6, 0.8, 0.7]}]
    shift = [0.02, 0.01, 0.2, 0.05]
    rows += [{"kind": "single", "blocks": [k], "scores": [s + shift[k] for s in base]} for k in range(4)]
    found = evidence.transplant.transplant_figures(rows, truth)
    assert found.blocks == (4, 4) and found.spearman == pytest.approx(-0.4) and found.recovery == pytest.approx(0.5)
    assert found.singles == pytest.approx(0.28 / 0.4) and found.all_blocks is None
    rows.append({"kind": "below", "blocks": [0, 1, 2, 3], "scores": [s + 0.3 for s in base]})
    assert evidence.transplant.transplant_figures(rows, truth).all_blocks == pytest.approx(0.75)
    assert evidence.transplant.transplant_figures(rows[:5], truth).spearman is None


def test_what_a_model_kept(evidence, monkeypatch):
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo = str(files("peft_onelayer") / "demo_model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(demo), AutoTokenizer.from_pretrained(demo)
    setting = evidence.one_run.Setting("demo", "sums", (), (), problems=4, samples=2)
    seen = {}

    def measured(model, tokenizer, task, rows, sampling):
        seen.update(task=task.name, problems=len(rows), samples=sampling.samples)
        return type("Found", (), {"mean": 0.25, "standard_error": 0.1, "scores": (0.0, 0.5, 0.5, 0.0)})

    monkeypatch.setattr(evidence.measures, "evaluate", measured)
    kept = evidence.measures.retention_of(setting, model, tokenizer)["retention"]
    assert seen["problems"] == 4 and "repeated" in seen["task"] and kept["other"]["scores"] == [0.0, 0.5, 0.5, 0.0]
    first = evidence.measures.PLAIN_TEXT.read_text().split("\n\n")[0]
    ids = tokenizer(first, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert kept["text"]["nats"][0] / kept["text"]["tokens"][0] == pytest.approx(float(loss), rel=1e-5)
    assert len(kept["text"]["nats"]) == 24


def test_the_experiments_on_what_changes(evidence):
    changes = evidence.rl_changes
    found = {setting.name: changes.experiments(setting) for setting in changes.STUDIES}
    assert {name: len(each) for name, each in found.items()} == {
        "smollm2-135m-sums": 20,
        "smollm2-135m-repeated": 17,
        "qwen2.5-coder-0.5b-repeated": 17,
        "demo-arithmetic": 15,
    }
    for each in found.values():
        assert len(set(map(str, each))) == len(each)
        for one in each:
            row = json.loads(json.dumps({"experiment": asdict(one)}))
            assert [changes.there(other, row) for other in each] == [other is one for other in each]


def test_the_rows_on_what_changes_are_of_planned_experiments(evidence):
    for setting in evidence.rl_changes.STUDIES:
        planned = evidence.rl_changes.experiments(setting)
        for row in read_records(evidence.RESULTS / f"{setting.name}-changes.jsonl"):
            assert row["setting"] == json.loads(json.dumps(asdict(setting)))
            assert sum(evidence.rl_changes.there(one, row) for one in planned) == 1
            for run in row.get("runs", []):
                assert run["mean"] == pytest.approx(sum(run["scores"]) / setting.problems, abs=1e-12)


def test_the_section_on_what_changes_is_what_the_rows_say(evidence):
    page = evidence.changes_page
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python examples/evidence/changes_page.py"


def test_shares_in_percent(evidence):
    assert doctest.testmod(evidence.changes_page) == (0, 1)


@pytest.mark.more
def test_each_kind_of_experiment_on_the_demo_model(evidence, tmp_path):
    changes = evidence.rl_changes
    setting = replace(changes.STUDIES[-1], steps=2, problems=8)
    rows = []
    with changes.demo_models() as models:
        for one in (
            changes.Experiment("change", "block", 3e-3, (0, 1)),
            changes.Experiment("change", "full", 3e-4, (0,), masters=False),
            changes.Experiment("subnetwork", "blocks", 3e-4),
        ):
            rows.append(changes.execute_experiment(setting, one, models / "demo"))
    block, full, part = rows
    totals = [row["runs"][0]["change"]["total"] for row in (block, full)]
    assert [total["tensors"] for total in totals] == [11, 134]
    dtypes = [row["runs"][0]["change"]["dtypes"] for row in (block, full)]
    assert [text.split()[-1] for text in dtypes] == ["float32", "bfloat16"]
    assert totals[1]["unchanged"]["0"] == totals[1]["unchanged_official"]["0"] < 1
    assert block["overlap"]["changed_a"] == totals[0]["changed"] and "overlap" not in full
    assert part["random"]["entries"] == part["subnetwork"]["entries"] < part["full"]["entries"] == 1
    assert set(part["full"]["equal_to_full"].values()) == {1.0}
    assert 1 - part["subnetwork"]["entries"] <= part["subnetwork"]["equal_to_full"]["0.0"] <= 1
    (tmp_path / "demo-arithmetic-changes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = evidence.changes_page.section(tmp_path)
    assert text.count("| all parameters | bfloat16 | 0.0003 |") == 1
    assert evidence.changes_page.share(block["overlap"]["overlap_a"]) in text


def test_what_early_rewards_say(evidence):
    setting = next(s for s in evidence.planned.SETTINGS if s.name == "smollm2-135m-sums")
    study = evidence.figures.Study.read(setting)
    base = study.of("base")[0]["mean"]
    early, final = np.zeros((2, 30)), np.zeros((2, 30))
    for r in study.rows:
        if r["run"]["kind"] == "block" and r["run"]["rate"] == study.rate("block"):
            early[r["run"]["seed"], r["run"]["block"]] = np.mean(r["rewards"][:8])
            final[r["run"]["seed"], r["run"]["block"]] = r["mean"] - base
    ran = [0, 4, 8, 12, 17, 21, 25, 29]
    reached = [final[1 - s, ran[early[s, ran].argmax()]] / final[1 - s].max() for s in (0, 1)]
    could = [final[1 - s, ran].max() / final[1 - s].max() for s in (0, 1)]
    table, said = evidence.early.early_rewards(study)
    of_eight = next(line for line in table.splitlines() if line.startswith("| 8 |")).split(" | ")[5]
    assert of_eight == f"{np.mean(reached):.2f} of {np.mean(could):.2f}"
    assert "the other seed" in said
    assert evidence.early.early_rewards(replace(study, rows=study.rows[:40])) == []  # before both sweeps are whole
