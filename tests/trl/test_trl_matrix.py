"""Every trainer of the installed TRL, by `peft_config=` and with a wrapped model whose adapter was trained before."""

import ast
import re
from pathlib import Path

import pytest
import torch
import trl
from peft import PeftModel, get_peft_model
from trl_cells import CELLS, DPO_LOSSES, GRPO_LOSSES, KTO_LOSSES, LAYER, LAYERS, SERVER_CELLS, dpo, grpo, kto
from trl_runner import WAYS, make, run
from tuner.helpers import wrap

from models import build
from peft_onelayer import SingleLayerConfig

NOT_IN_THE_TABLE = {
    "trainer.base_trainer._BaseTrainer": "the base class",
    "experimental.kto.KTOTrainer": "the old name of trl.KTOTrainer",
    "experimental.distillation.DistillationTrainer": "the old name of trl.DistillationTrainer",
}
REFUSED = ("sync_ref_model", "teacher_model_kind ema")  # before anything is trained


def test_no_trainer_is_left_out():
    """Read from the source, because some modules of trl.experimental need packages that are not installed."""
    root = Path(trl.__file__).parent
    found = set()
    for path in [*root.glob("trainer/*.py"), *root.glob("experimental/**/*.py")]:
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        classes = (node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
        found |= {f"{module}.{name}" for name in classes if name.endswith("Trainer")}
    tested = {f"{cell.trainer.__module__.removeprefix('trl.')}.{cell.name}" for cell in [*CELLS, *SERVER_CELLS]}
    assert found == tested | NOT_IN_THE_TABLE.keys()


@pytest.mark.parametrize(("trainer", "losses"), [("grpo", GRPO_LOSSES), ("dpo", DPO_LOSSES), ("kto", KTO_LOSSES)])
def test_no_loss_is_left_out(trainer, losses):
    """The strings that the trainer's source compares its loss type with."""
    tree = ast.parse((Path(trl.__file__).parent / "trainer" / f"{trainer}_trainer.py").read_text())
    compared = (node for node in ast.walk(tree) if isinstance(node, ast.Compare))
    on_loss = (node for node in compared if re.fullmatch(r"(\w+\.)?loss_type", ast.unparse(node.left)))
    constants = (part for node in on_loss for value in node.comparators for part in ast.walk(value))
    assert {part.value for part in constants if isinstance(part, ast.Constant)} == set(losses)


def runs():
    """The first variant of each cell on a bfloat16 base, the rest is slow: by default of a wrapped model for the first
    cell of each trainer and what TRL refuses, and with `peft_config` for the very first; `more` for the others."""
    trainers = set()
    for cell in CELLS:
        for i, variant in enumerate(cell.variants()):
            for dtype in (torch.bfloat16,) if cell.slow else (torch.bfloat16, torch.float32):
                for way in WAYS:
                    shown = cell.trainer not in trainers or cell.mode in REFUSED
                    shown = shown if way == "wrapped" else not trainers
                    marks = [] if shown else [pytest.mark.more]
                    marks = [pytest.mark.slow] if i or cell.slow or dtype == torch.float32 else marks
                    name = f"{cell.name}-{cell.label(variant)}-{way}-{str(dtype).removeprefix('torch.')}"
                    yield pytest.param(cell, variant, way, dtype, id=name.replace(" ", "_"), marks=marks)
        trainers.add(cell.trainer)


@pytest.mark.parametrize(("cell", "variant", "way", "dtype"), list(runs()))
def test_trainer(tmp_path, chat_tokenizer, record, cell, variant, way, dtype):
    try:
        results = run(cell, variant, way, dtype, chat_tokenizer, tmp_path)
    except RuntimeError as error:
        if "pack_vnni2" not in str(error):
            raise
        pytest.skip(f"torch's attention in bfloat16 takes AMX that ATEN_CPU_CAPABILITY has hidden: {error}")
    record(cell, variant, way, results)


def one_cell_of_each_trainer():
    """By default GRPO for those that cannot see it in a forward pass, and DPO for the others."""
    for cell in {
        cell.name: cell for cell in reversed(CELLS) if not (cell.head or cell.mixin or cell.follower)
    }.values():
        unseen = cell.name in ("RLOOTrainer", "DistillationTrainer")
        marks = [pytest.mark.more] if unseen else [pytest.mark.slow]
        yield pytest.param(cell, id=cell.name, marks=[] if cell.name in ("GRPOTrainer", "DPOTrainer") else marks)


@pytest.mark.parametrize("cell", list(one_cell_of_each_trainer()))
def test_a_frozen_adapter_is_refused(tmp_path, chat_tokenizer, cell):
    wrap(build(num_layers=LAYERS), layer=LAYER, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(build(num_layers=LAYERS), tmp_path / "adapter")
    trainer = make(cell, model, chat_tokenizer, tmp_path, torch.float32, **cell.variants()[0])()
    with pytest.raises(RuntimeError, match="load it with is_trainable=True"):
        trainer.train()


@pytest.mark.parametrize("cell", [grpo(), grpo(path="RLOOTrainer"), dpo(), kto()], ids=["GRPO", "RLOO", "DPO", "KTO"])
def test_a_reference_needs_the_name_default(tmp_path, chat_tokenizer, cell):
    """TRL copies `peft_config["default"]`; docs/trainers.md says so."""
    config = SingleLayerConfig(layer=LAYER, task_type="CAUSAL_LM")
    model = get_peft_model(build(num_layers=LAYERS), config, adapter_name="policy")
    with pytest.raises(KeyError, match="default"):
        make(cell, model, chat_tokenizer, tmp_path, torch.float32)()
