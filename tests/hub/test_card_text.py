"""A card that people edit: our parts are written anew, all else is kept, here and on the Hub."""

import json
from dataclasses import replace

import pytest
from front_matter import metadata_errors
from huggingface_hub import ModelCard
from peft import get_peft_model
from trl.trainer.utils import generate_model_card

import models
from peft_onelayer import SingleLayerConfig, write_card
from peft_onelayer.hub.card_text import merge_cards, own_text, part, split_card
from peft_onelayer.records.evaluation import EvaluationRecord, Example

MINE = "## How I made it\n\nWith *care*; see /// and <!-- a comment -->.\n"


def test_a_card_written_twice_is_the_same(quick):
    first = write_card(quick)
    assert (quick / "README.md").read_text() == first == write_card(quick)
    assert metadata_errors(first) == [] and own_text(first) == "as trained"


def test_text_around_our_parts_and_fields_of_the_front_matter_stay(quick):
    card = write_card(quick).replace("as trained\n", "")
    edited = card.replace("---\n", "---\nlicense: mit\nthumbnail: x\n", 1).replace("language: en", "language: de")
    edited = edited.replace("- onelayer\n", "- onelayer\n- mine\n- layer:9\n").replace(
        "<!-- onelayer: limits", f"{MINE}<!-- onelayer: limits"
    )
    edited = edited.replace("learning rate 5e-06", "a lie")
    (quick / "README.md").write_text(edited)
    (quick / "eval.json").unlink()  # so that the results are no longer there
    found = write_card(quick)
    assert own_text(found) == MINE.strip() and "a lie" not in found and "learning rate 5e-06" in found
    assert found.index("## Use") < found.index("## How I made it") < found.index("## Limits")
    data = ModelCard(found).data
    assert (data.license, data.language, data.to_dict()["thumbnail"]) == ("mit", "de", "x")
    assert "mine" in data.tags and "layer:9" not in data.tags and data.tags.count("onelayer") == 1
    assert data.eval_results is None and "0.3750" not in found
    assert ModelCard(write_card(quick, license="apache-2.0")).data.license == "apache-2.0"


def test_a_part_that_was_taken_out_stays_out(quick):
    card = write_card(quick)
    start = card.index("<!-- onelayer: reproduce")
    end = card.index("<!-- /onelayer -->", start) + len("<!-- /onelayer -->\n")
    (quick / "README.md").write_text(card[:start] + card[end:])
    assert "## Reproduce" in card and "## Reproduce" not in write_card(quick)


def test_a_card_without_marks_is_kept_before_ours():
    ours = "---\ntags:\n- onelayer\n---\n\n<!-- onelayer: title -->\n# T\n<!-- /onelayer -->\n"
    merged = merge_cards(ours, "# Mine\n\nText.")
    assert merged.endswith("# Mine\n\nText.\n\n<!-- onelayer: title -->\n# T\n<!-- /onelayer -->\n")
    assert merge_cards(ours, merged) == merged
    assert merge_cards(ours, "---\n[not yaml\n---\nText.").endswith(
        "Text.\n\n<!-- onelayer: title -->\n# T\n<!-- /onelayer -->\n"
    )


def test_an_adapter_saved_from_python_gets_a_real_card(base_folder, tmp_path):
    base = models.build()
    base.name_or_path = base.config._name_or_path = str(base_folder)
    get_peft_model(base, SingleLayerConfig(layer=1)).save_pretrained(tmp_path / "mine")
    before = (tmp_path / "mine" / "README.md").read_text()
    assert "[More Information Needed]" in before and str(base_folder) in before
    card = write_card(tmp_path / "mine", base_model="org/tiny", license="mit")
    assert "[More Information Needed]" not in card and str(base_folder.parent) not in card
    assert "# tiny: block 1 of 4" in card and metadata_errors(card) == []
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/tiny", "adapter", "mit")


def test_the_license_is_that_of_the_bases_card(quick, base_folder):
    (base_folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    try:
        assert ModelCard(write_card(quick)).data.license == "apache-2.0"
    finally:
        (base_folder / "README.md").unlink()


@pytest.mark.parametrize(("task", "shown"), [("gsm8k", True), ("my_task.py", False)])
def test_the_example_is_shown_of_public_data_only(quick, task, shown):
    record = EvaluationRecord.from_file(quick / "eval.json")
    example = Example("greedy", "What is 6 x 7?", "41", 0.0, "42\n```", 1.0)
    source = replace(record.task, name=task, data=record.task.data if shown else {"my_task.py": "sha256:0"})
    (quick / "eval.json").write_text(replace(record, task=source, examples=[example]).to_json())
    card = write_card(quick)
    assert ("What is 6 x 7?" in card) == shown
    assert not shown or "**adapter** (reward 1)\n\n    42\n    ```" in card


def test_whether_a_repository_holds_an_adapter(hub, ask):
    hub.add("me/run", {"adapter_config.json": b"{}"})
    hub.add("me/model", {"config.json": b"{}"})
    code = "from peft_onelayer.records.locate import holds_adapter\n"
    code += "result = [holds_adapter(name) for name in ('me/run', 'me/model', 'me/none')]"
    assert ask(code=code).result == [True, False, False]


@pytest.mark.more
def test_push_keeps_what_was_written_here(hub, ask, quick):
    (quick / "README.md").write_text("---\nlicense: mit\n---\n# My title\n")
    shown = ask("push", quick, "me/gsm", "--dry-run").out
    assert "# My title" in shown and "## Use" in shown
    assert ask("push", quick, "me/gsm").code == 0
    card = hub.files("me/gsm")["README.md"].decode()
    assert ModelCard(card).data.license == "mit" and own_text(card) == "# My title" and "## Use" in card


def test_push_keeps_what_was_written_on_the_hub(hub, ask, quick):
    (quick / "README.md").unlink()
    assert ask("push", quick, "me/gsm").code == 0
    repo = hub.repos["me/gsm"]
    files = repo.commits[repo.branches["main"]]
    files["README.md"] += MINE.encode()
    files["README.md"] = files["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
    (quick / "eval.json").unlink()
    answer = ask("push", quick, "me/gsm")
    card = hub.files("me/gsm")["README.md"].decode()
    assert answer.code == 0 and own_text(card) == MINE.strip() and "0.3750" not in card
    assert ModelCard(card).data.license == "mit"
    write = (quick / "README.md").write_text
    write("Written here.")
    answer = ask("push", quick, "me/gsm")
    card = hub.files("me/gsm")["README.md"].decode()
    assert own_text(card) == "Written here." and ModelCard(card).data.license == "mit"
    assert any("edited here and on the Hub" in line for line in answer.err)


@pytest.mark.more
def test_a_later_push_keeps_the_form_for_plain_peft_and_renews_it(hub, ask, quick):
    (quick / "eval.json").unlink()
    assert ask("push", quick, "me/gsm", "--with-peft").code == 0
    before = hub.files("me/gsm")
    assert ask("push", quick, "me/gsm").code == 0
    assert hub.files("me/gsm") == before and "peft/adapter_model.safetensors" in before
    config = json.loads((quick / "adapter_config.json").read_text())
    (quick / "adapter_config.json").write_text(json.dumps(config | {"inference_mode": False}))
    assert ask("push", quick, "me/gsm").code == 0
    assert hub.files("me/gsm")["peft/adapter_model.safetensors"] == before["peft/adapter_model.safetensors"]


@pytest.mark.parametrize("template", ["lm_model_card.md", "rm_model_card.md"])
def test_what_trl_writes_beside_a_checkpoint_is_not_published(template):
    written = str(
        generate_model_card(
            base_model=None,
            model_name="out",
            hub_model_id=None,
            dataset_name=None,
            tags=["generated_from_trainer", "grpo", "trl"],
            wandb_url="https://wandb.ai/alice/secret-project/runs/1",
            trackio_url=None,
            trainer_name="GRPO",
            trainer_citation="@article{x}",
            template_file=template,
        )
    )
    ours = "---\nlibrary_name: peft\ntags:\n- onelayer\n---\n\n" + part("title", "# One block") + "\n"
    merged = merge_cards(ours, written)
    assert own_text(written) == "" and split_card(merged)[1] == split_card(ours)[1]
    assert split_card(merged)[0] == {
        "library_name": "peft",
        "tags": ["onelayer", "generated_from_trainer", "trl"],
    }
    mine = written.rstrip("\n") + "\n\n## My notes\n\nMine.\n"
    assert own_text(mine) == "## My notes\n\nMine." and "secret-project" not in merge_cards(ours, mine)
    within = written.replace("## Citations", "## Results\n\nMine.\n\n## Citations")
    assert "Mine." in own_text(within)  # a person's heading among TRL's: nothing of the card is lost
