"""The adapter of SmolLM2-135M that the repository ships: its files belong together, and its card is the template's."""

import re
import shutil
from pathlib import Path

from peft_onelayer import inspect_adapter, write_card
from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.files import file_digest
from peft_onelayer.records.run import RunRecord

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "smollm2-135m-sums"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_files_are_of_one_run():
    run = RunRecord.from_json((FOLDER / "run.json").read_text(encoding="utf-8"), "run.json")
    measured = EvaluationRecord.from_json((FOLDER / "eval.json").read_text(encoding="utf-8"), "eval.json")
    assert run.settings.model.name == BASE and run.layers == [14]
    assert run.settings.task.data == {"sums.py": f"sha256:{file_digest(FOLDER / 'sums.py')}"} == measured.task.data
    found = inspect_adapter(FOLDER)
    assert (found.base["name"], found.layers, found.num_layers, found.encoding) == (BASE, [14], 30, "sparse")
    assert found.bytes < 3_000_000 and len(found.tensors) == 9


def test_the_card_is_what_the_template_makes_of_the_records_beside_what_was_written_by_hand(tmp_path):
    folder = tmp_path / FOLDER.name
    shutil.copytree(FOLDER, folder)
    written = FOLDER / "README.md"
    emptied = re.sub(
        r"(<!-- onelayer: \w+.*?-->).*?(?=<!-- /onelayer)", r"\1\n", written.read_text(encoding="utf-8"), flags=re.S
    )
    assert "Results" not in emptied and "is not the checkpoint on the Hub" in emptied
    (folder / "README.md").write_text(emptied, encoding="utf-8")
    card = write_card(folder, base_model=BASE, license="apache-2.0", draw=False)
    assert card == (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == (ROOT / "model_cards" / "smollm2-135m-sums.md").read_text(encoding="utf-8")
