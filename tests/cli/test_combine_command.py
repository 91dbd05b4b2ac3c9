"""`onelayer combine`: what it prints, CPI-FT's fourth stage, and every mistake in one line."""

import json
from importlib.resources import files

import pytest
import torch
from changes import save_adapter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from peft_onelayer.sparse.names import base_name
from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.mixture import mixture

BASE = str(files("peft_onelayer") / "demo_model")


def test_what_it_prints(onelayer, tmp_path):
    models.build().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        save_adapter(tmp_path / name, tmp_path / "base", 1, seed=seed)
    code, _, out = onelayer("combine", tmp_path / "one", tmp_path / "two", tmp_path / "sum", "--method", "sum")
    assert code == 0 and "sum of 2 adapters" in out and "of these in different directions" in out
    code, _, out = onelayer(
        *("combine", tmp_path / "one", tmp_path / "two", tmp_path / "cpi", "--method", "cpi", "--json"),
        *("--mask-out", tmp_path / "mask.safetensors"),
    )
    found = json.loads(out)
    assert code == 0 and found["format"] == "onelayer-combine-1" and found["groups"] == [[0], [1]]
    assert found["conflict_share"] == found["conflicts"] / found["changed_by_several"]
    kept = sum(int(mask.sum()) for mask in load_file(tmp_path / "mask.safetensors").values())
    assert kept == found["entries"] - sum(found["cores"])
    for arguments, match in (
        (["combine", tmp_path / "one", tmp_path / "two", tmp_path / "x"], "do not stack"),
        (["combine", tmp_path / "one", tmp_path / "x"], "two adapters or more"),
        (["combine", tmp_path / "one", tmp_path / "two", tmp_path / "x", "--stage-four", "sort"], "is of --method cpi"),
    ):
        code, lines, _ = onelayer(*arguments)
        assert code == 1 and match in lines[-1]


def test_a_mixture_grades_each_completion_by_its_own_task():
    tasks = [load_task("arithmetic"), load_task("sort")]
    mixed = mixture(tasks)
    rows = mixed.rows("train", 5, 3)
    own = [tasks[0].rows("train", 3, 3), tasks[1].rows("train", 2, 3)]
    assert [row["prompt"] for row in rows] == [own[i % 2][i // 2]["prompt"] for i in range(5)]
    answers = [own[i % 2][i // 2]["answer"] for i in range(5)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    given = [*answers[:3], "no", answers[4]]
    assert mixed.reward(prompts=[""] * 5, completions=given, **columns) == [1.0, 1.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="different tasks"):
        mixture([tasks[0], tasks[0]])


@pytest.mark.parametrize(("given", "chat"), [((), None), (("--plain",), False), (("--chat",), True)])
def test_the_fourth_stage_gives_prompts_as_it_is_told(onelayer, tmp_path, monkeypatch, given, chat):
    models.build().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        save_adapter(tmp_path / name, tmp_path / "base", 1, seed=seed)
    asked = []

    def train(settings, **options):
        asked.append(settings)
        raise ValueError("not trained here")

    monkeypatch.setattr("peft_onelayer.runs.stage_four.train", train)
    arguments = [tmp_path / "one", tmp_path / "two", tmp_path / "four", "--method", "cpi"]
    code, lines, _ = onelayer("combine", *arguments, "--stage-four", "arithmetic,sort", *given)
    assert code == 1 and "not trained here" in lines[-1]
    assert [settings.chat for settings in asked] == [chat]


@pytest.mark.more
def test_the_fourth_stage_leaves_core_regions_as_the_fusion_has_them(onelayer, tmp_path):
    for seed, name in enumerate(("one", "two")):
        save_adapter(tmp_path / name, BASE, 5, seed=seed, size=0.003)
    arguments = ["combine", tmp_path / "one", tmp_path / "two"]
    cpi = ["--method", "cpi", "--core", ".05"]
    mask = tmp_path / "mask.safetensors"
    assert onelayer(*arguments, tmp_path / "fused", *cpi, "--mask-out", mask)[0] == 0
    code, lines, _ = onelayer(
        *arguments,
        tmp_path / "four",
        *cpi,
        "--stage-four",
        "arithmetic,sort",
        "--steps",
        "2",
        "--learning-rate",
        "1e-3",
    )
    assert code == 0, lines
    fused, four = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fused", "four"))
    free = load_file(mask)
    moved = {base_name(key): four[key].to(fused[key].dtype) != fused[key] for key in fused}
    assert all(not (moved[name] & ~free[name]).any() for name in moved) and any(m.any() for m in moved.values())
    config = (tmp_path / "four" / "adapter_config.json").read_text()
    assert json.loads(config)["combined"]["stage_four"] == "arithmetic+sort" and str(tmp_path) not in config
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(tmp_path / "four"))
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
