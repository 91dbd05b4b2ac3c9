"""The card: what the records say and nothing else, in a form that the Hub's metadata check accepts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from front_matter import metadata_errors
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries

from peft_onelayer.hub.card import model_card
from peft_onelayer.hub.push import stage
from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.privacy import without_private
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import RunRecord


def staged(adapter, tmp_path, **options):
    (tmp_path / "staged").mkdir()
    stage(adapter, tmp_path / "staged", "me/gsm", **options)
    return tmp_path / "staged"


def test_its_front_matter_is_what_the_hub_reads(adapter, tmp_path):
    path = staged(adapter, tmp_path, base_model="org/tiny") / "README.md"
    assert metadata_errors(path.read_text()) == []
    assert metadata_load(path)["base_model"] == "org/tiny"
    data = ModelCard.load(path).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "org/tiny", "adapter")
    assert data.tags == ["onelayer", "reinforcement-learning", "grpo", "gsm8k", "task:gsm8k", "layer:1"]
    assert data.datasets == ["openai/gsm8k"]
    greedy, sampled = data.eval_results
    assert (greedy.metric_value, greedy.metric_name) == (0.375, "mean reward, greedy")
    assert sampled.metric_name == "mean reward, avg@4 at temperature 1"
    assert sampled.metric_args == {"n": 64, "samples": 4, "standard_error": 0.0341}
    assert (greedy.dataset_type, greedy.dataset_config, greedy.dataset_split) == ("openai/gsm8k", "main", "test")
    assert greedy.dataset_revision == "e53f048856ff4f594e959d75785d2c2d37b678ee"


@pytest.mark.parametrize("name", ["mine.csv", "openai/gsm8k"])
def test_a_file_of_ones_own_is_named_in_the_text_alone(adapter, tmp_path, name):
    for file in ("run.json", "eval.json"):
        record = json.loads((adapter / file).read_text())
        source = record["task"] if file == "eval.json" else record["settings"]["task"]
        source |= {"name": f"data/{name}", "data": {name: "sha256:" + "0" * 64}}
        (adapter / file).write_text(json.dumps(record))
    (adapter / "README.md").write_text("---\ndatasets:\n- data/mine.csv\n- org/theirs\n---\nMine.\n")
    folder = staged(adapter, tmp_path)
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["org/theirs"] and f"{name} (sha256:00000)" in card.text
    assert card.data.tags == ["onelayer", "reinforcement-learning", "grpo", "layer:1"]
    assert not (folder / ".eval_results").exists() and card.data.eval_results[0].dataset_revision is None


@pytest.mark.parametrize(
    ("name", "data", "tag", "datasets"),
    [
        ("gsm8k:/data/mine.jsonl", {"mine.jsonl": "sha256:" + "0" * 64}, "gsm8k", None),
        ("gsm8k+sort", {"gsm8k openai/gsm8k:main": "c" * 40}, "gsm8k+sort", ["openai/gsm8k"]),
        (
            "gsm8k+tasks/sums.py+mbpp:org/mine",
            {"gsm8k openai/gsm8k:main": "c" * 40, "sums.py sums.py": "sha256:0", "mbpp:org/mine org/mine": "d" * 40},
            "gsm8k+tasks/sums.py+mbpp:org/mine",
            ["openai/gsm8k", "org/mine"],
        ),
        ("org/mine@v1", {"org/mine@v1": "c" * 40, "reward.py": "sha256:0"}, "org/mine@v1", ["org/mine"]),
        ("sums.py", {"sums.py": "sha256:0"}, "sums.py", None),
    ],
)
def test_the_tag_of_the_task_and_the_data_sets_of_a_mixture(adapter, tmp_path, name, data, tag, datasets):
    run = RunRecord.from_file(adapter / "run.json")
    task = replace(run.settings.task, name=name, data=data)
    card = ModelCard(model_card({}, replace(run, settings=replace(run.settings, task=task))))
    assert [tag for tag in card.data.tags if tag.startswith("task:")] == [f"task:{tag}"]
    assert card.data.datasets == datasets


def test_the_leaderboards_entry(adapter, tmp_path):
    path = staged(adapter, tmp_path) / ".eval_results" / "onelayer.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 37.5)
    assert entry.notes == "onelayer eval, greedy, n = 64, standard error 3.41"


def test_it_says_what_was_measured_and_how_to_use_it(adapter, tmp_path):
    folder = staged(adapter, tmp_path, base_model="org/tiny")
    card = (folder / "README.md").read_text()
    assert "# tiny: block 1 of 4, trained with grpo on `gsm8k`" in card
    assert "| greedy | 64 | 0.2500 ± 0.0312 | 0.3750 ± 0.0341 | +0.1250 ± 0.0123 |" in card
    assert "![What each block gains](layer_profile.png)" in card
    assert (folder / "layer_profile.png").read_bytes().startswith(b"\x89PNG")
    assert "of 30,000 parameters" in card and "GRPOTrainer" in card and "learning rate 5e-06" in card
    assert "mean reward 0.1 -> 0.4 (first and last 2 of 20 logs)" in card
    use = card.split("```python\n")[1].split("```")[0]
    assert "tokenizer.apply_chat_template(" in use and "model.generate(**inputs" in use
    compile(use, "card", "exec")
    assert 'from_pretrained("me/gsm")' in use and 'from_pretrained("org/tiny")' in use
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG") and "](reward.png)" in card
    assert "hardware: cpu" in card and "arXiv 2402.03300" in card and "## Limits" in card
    assert "onelayer train org/tiny --layer auto --task gsm8k" in card.split("## Reproduce")[1]


def test_other_tasks_stand_beside_the_gain(adapter, tmp_path):
    record = EvaluationRecord.from_file(adapter / "eval.json")
    other = record.results["greedy"]
    (adapter / "eval.json").write_text(replace(record, also={"/home/me/sums.py": {"greedy": other}}).to_json())
    card = (staged(adapter, tmp_path) / "README.md").read_text()
    assert "Other tasks, before and after:" in card and "/home" not in card
    assert "| sums.py | greedy | 64 | 0.2500 ± 0.0312 | 0.3750 ± 0.0341 | +0.1250 ± 0.0123 |" in card
    assert metadata_errors(card) == []


def test_nothing_is_invented_where_nothing_is_known(adapter, tmp_path):
    for name in ("run.json", "layer_profile.json", "eval.json"):
        (adapter / name).unlink()
    folder = staged(adapter, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = (folder / "README.md").read_text()
    assert metadata_errors(card) == []
    data = ModelCard(card).data
    assert data.tags == ["onelayer", "reinforcement-learning", "layer:1"]
    assert data.base_model is None and data.datasets is None and data.eval_results is None
    for word in ("None", "$", "Results", "Layer profile", "Reproduce", "trained with", "[]", "nan", "\n\n\n", ".png"):
        assert word not in card, word
    assert "No evaluation is recorded here" in card and "no record of the training run" in card


def test_a_standard_error_that_is_not_known_is_a_question_mark(adapter, tmp_path):
    evaluation = json.loads((adapter / "eval.json").read_text())
    for result in evaluation["results"].values():
        result["adapter"]["standard_error"] = None
    (adapter / "eval.json").write_text(json.dumps(evaluation))
    card = (staged(adapter, tmp_path) / "README.md").read_text()
    assert "0.3750 ± ?" in card and metadata_errors(card) == []


def test_the_card_of_a_full_run_is_a_models(adapter):
    run = RunRecord.from_file(adapter / "run.json")
    model = replace(run.settings.model, name="org/tiny", revision="c" * 40)
    card = model_card(None, replace(run, layers=None, settings=replace(run.settings, full=True, model=model)))
    data = ModelCard(card).data
    assert (data.library_name, data.base_model_relation) == ("transformers", "finetune")
    assert "# tiny: all blocks" in card and "AutoModelForCausalLM" in card and "peft_onelayer" not in card


def test_a_sweeps_cost_is_told_in_runs(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    ranking = LayerRanking.from_file(adapter / "layer_profile.json")
    assert "picked block 1 of 4, for 5% of the tokens of the training run." in model_card(config, profile=ranking)
    sweep = replace(ranking, method="sweep", cost={**ranking.cost, "share": 9.53})
    assert "picked block 1 of 4, for 9.5 times the tokens of one training run." in model_card(config, profile=sweep)


@pytest.mark.parametrize("name", ["demo", "train"])
def test_cards_of_records_that_earlier_versions_wrote(name):
    folder = Path(__file__).parents[1] / "records" / "old" / name
    run, evaluation = RunRecord.from_file(folder / "run.json"), EvaluationRecord.from_file(folder / "eval.json")
    card = model_card({"layer_indices": [5], "num_layers": 12}, run, evaluation, parameters=43_000, local_base=True)
    assert metadata_errors(card) == []
    assert "block 5 of 12, trained with grpo on `arithmetic`" in card
    assert f"{run.results.steps} steps, learning rate {run.settings.config['learning_rate']:g}, seed 0" in card
    assert "| avg@4 at temperature 1 |" in card and "| greedy |" in card and run.command in card
    assert (run.results.verdict or "mean reward") in card and "None" not in card


@pytest.mark.parametrize(
    "text",
    [
        *(
            "/home/me/x",
            "~/x/y",
            "../secret/x",
            "C:\\me\\x",
            "file:///home/me/x",
            "gsm8k:/home/me/x",
            "see '/home/me/x'",
        ),
        *("me/x.jsonl", "me/x.csv", "me/x.parquet", "secret/me/x.py:score"),
    ],
)
def test_paths_are_cut_to_their_last_part(text):
    cleaned = without_private([text])[0]
    assert "me" not in cleaned and "secret" not in cleaned and "x" in cleaned + "x/y"


@pytest.mark.parametrize("text", ["org/name", "and/or", "1/2", "</s>", "https://h.co/a/b", "lr=1e-5", "/think", "a: b"])
def test_what_is_no_path_stays(text):
    assert without_private([text]) == [text]


def test_a_folder_that_looks_like_a_hub_id_is_still_a_folder(adapter, base_folder, tmp_path, monkeypatch):
    """A base that was given as "secret/tiny": run.json has the digests of its files."""
    monkeypatch.chdir(base_folder.parent)
    Path("secret").mkdir()
    Path("secret/tiny").symlink_to(base_folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "secret/tiny"}))
    run = json.loads((adapter / "run.json").read_text().replace(str(base_folder), "secret/tiny"))
    (adapter / "run.json").write_text(json.dumps(run))
    (adapter / "layer_profile.json").unlink()
    published = staged(adapter, tmp_path)
    assert all(b"secret" not in path.read_bytes() for path in published.rglob("*") if path.is_file())
    card = (published / "README.md").read_text()
    assert "base_model" not in card and 'from_pretrained("path/to/tiny")' in card
    config = json.loads((published / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["encoding"]["base"]["name"]) == ("tiny", "tiny")


def test_a_command_names_no_folder_of_ours():
    command = "onelayer train my/base --out runs/secret --adapter=runs/secret --set logging_dir=/home/me/x --seed 1"
    cleaned = without_private({"command": command}, {"my/base": "org/base"})["command"]
    assert cleaned == "onelayer train org/base --out secret --adapter=secret --set logging_dir=x --seed 1"
    assert without_private({"command": "onelayer train my/base"})["command"] == "onelayer train my/base"
