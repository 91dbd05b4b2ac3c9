"""What only reads files, and what is wrong, needs neither torch's nor peft's import, which take seconds."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from peft import get_peft_model
from run_records import RECORD
from worker import HEAVY, Worker

import models
from peft_onelayer import SingleLayerConfig, export_adapter, inspect_adapter


@pytest.fixture(scope="module")
def onelayer():
    worker = Worker(os.environ | {"HF_HUB_OFFLINE": "1"}, HEAVY)
    yield worker
    worker.close()


TRAIN = ["train", "{root}/base", "--out", "{root}/new"]
TWO_RATES = ["--learning-rate", "auto", "--set", "learning_rate=1e-3"]
DPO = [*TRAIN, "--algorithm", "dpo", "--task", "sort", "--pairs-from-task", "8"]
REWARD = ["--reward", "{root}/task.py:my_reward"]
SWEEP = ["sweep", "{root}/base", "--task", "sort"]
VOTE = ["vote", "{root}/dense", "{root}/sparse", "--task", "sort", "--base", "{root}/base"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a dense and a sparse adapter of it, and damaged ones of either kind."""
    root = tmp_path_factory.mktemp("files")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base")
    for name, other in (("other", {"seed": 1}), ("narrow", {"intermediate_size": 40}), ("shallow", {"num_layers": 3})):
        models.build(dtype=torch.bfloat16, **other).save_pretrained(root / name)
    base = models.build(dtype=torch.bfloat16)
    base.name_or_path = base.config._name_or_path = str(root / "base")
    model = get_peft_model(base, SingleLayerConfig(layer=1))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.1)
    model.save_pretrained(root / "dense")
    export_adapter(root / "dense", root / "sparse", "sparse")
    for name in ("dense", "sparse"):
        shutil.copytree(root / name, root / f"cut-{name}")
        weights = root / f"cut-{name}" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
    for name, base_model in (("moved", "/nowhere/base"), ("pulled", "my_model")):  # adapters of a folder elsewhere
        shutil.copytree(root / "dense", root / name)
        config = json.loads((root / name / "adapter_config.json").read_text()) | {"base_model_name_or_path": base_model}
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    (root / "pulled" / "run.json").write_text(json.dumps({"settings": {"model": {"sha256": {"config.json": "0"}}}}))
    (root / "zero.yaml").write_text(f"model: {root}/base\ntask: sort\nlearning_rate: 0\n")
    (root / "misspelt.yaml").write_text("task: sort\nstpes: 3\n")
    (root / "sampled.yaml").write_text("sampling: {tpo_p: 1}\n")
    (root / "task.py").write_text("def my_reward(completions, **kwargs):\n    return [0.0 for _ in completions]\n")
    (root / "unrewarded.py").write_text("def rows(split, n, seed):\n    return [{'prompt': 'p'}]\n")
    (root / "weightless").mkdir()
    shutil.copy(root / "base" / "config.json", root / "weightless")
    (root / "rows.jsonl").write_text('{"text": "a"}\n')
    (root / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (root / "empty.jsonl").write_text("")
    (root / "rows.csv").write_text("question,answer\n1,2\n")
    run = root / "finished"
    (run / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    settings = dataclasses.replace(RECORD.settings, config={"max_steps": 2})
    (run / "run.json").write_text(dataclasses.replace(RECORD, settings=settings, status="finished").to_json())
    (run / "run.yaml").write_text(f"model: {root}/base\ntask: sort\nlayer: '1'\nsteps: 2\n")
    (root / "broken.py").write_text("def rows(:\n")
    return root


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["--version"], [], ["inspect", "--help"], ["inspect", "-h"], ["train", "--help"]]
)
def test_help_and_version(onelayer, arguments):
    answer = onelayer(*arguments)
    assert (answer.code, answer.err) == (0, []) and answer.out.startswith(("Usage: onelayer", "onelayer "))


@pytest.mark.parametrize("adapter", ["dense", "sparse"])
def test_inspect_says_all_that_it_says_with_torch(onelayer, files, adapter):
    answer = onelayer("inspect", files / adapter, "--json")
    assert (answer.code, answer.err) == (0, [])
    assert json.loads(answer.out) == json.loads(json.dumps(inspect_adapter(files / adapter).to_json()))
    answer = onelayer("inspect", files / adapter)
    assert (answer.code, answer.err) == (0, []) and "block 1 of 4" in answer.out


LORA = ["--format", "lora"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-command"], 2, "No such command"),
        (["inspect"], 2, "Missing argument"),
        (["inspect", "{root}/cut-dense"], 1, "damaged"),
        (["inspect", "{root}/cut-sparse"], 1, "damaged"),
        (["inspect", "{root}/base"], 1, "base holds no adapter_config.json, so it is a model and no adapter."),
        (["push", "{root}/base", "me/x"], 1, "base holds no adapter_config.json, so it is a model and no adapter."),
        (["merge", "{root}/dense", "{root}/base", "{root}/out"], 1, "first: {root}/base {root}/dense {root}/out"),
        (["merge", "{root}/base", "{root}/base", "{root}/out"], 1, "adapter_config.json, so it is a model and no"),
        (
            ["export", "{root}/out", "{root}/dense", "--format", "peft"],
            1,
            "the output comes last: onelayer export {root}/d",
        ),
        (["export", "out", "{root}/dense", "--format", "peft"], 1, "last: onelayer export {root}/dense out"),
        (["combine", "out", "{root}/dense", "{root}/sparse"], 1, "combine {root}/dense {root}/sparse out"),
        (["merge", "out", "{root}/base", "{root}/dense"], 1, "output comes last: onelayer merge BASE ADAPTER... OUT"),
        (["generate", "{root}/dense", "{root}/base", "--prompt", "a"], 1, "generate {root}/base {root}/dense"),
        (["push", "me/x", "{root}/dense"], 1, "the adapter comes first: onelayer push {root}/dense me/x"),
        (["eval", "{root}/dense", "{root}/base"], 2, "onelayer eval {root}/base --adapter {root}/dense; see"),
        (["eval", "{root}/base", "{root}/dense"], 2, "onelayer eval {root}/base --adapter {root}/dense; see"),
        (["eval", "{root}/dense", "--adapter", "{root}/base", "--task", "sort"], 1, "{root}/base --adapter {root}/de"),
        (["train", "{root}/dense", "{root}/base"], 2, "train {root}/base --init-adapter {root}/dense; see"),
        (["train", "{root}/base", "{root}/new"], 2, "({root}/new); it takes MODEL, and all else by options; see"),
        (["train", "{root}/dense", "--task", "sort", "--out", "{root}/new"], 1, "is an adapter of {root}/base and no"),
        (["inspect", "./nowhere"], 1, "no adapter folder at nowhere"),
        (["inspect", "{root}/dense", "--base", "./nowhere"], 1, "no model folder at nowhere"),
        (["inspect", "{root}/dense", "--base", "{root}/sparse"], 1, "is an adapter and not a base model"),
        (["inspect", "{root}/dense", "--revision", "v1"], 1, "--revision v1 is for a repository on the Hub, and"),
        (["merge", "{root}/base", "{root}/dense"], 2, "Missing argument"),
        (["merge", "{root}/base", "{root}/dense", "{root}/out", "--revision", "v1"], 1, "base is a folder here; leave"),
        (["merge", "{root}/base", "{root}/dense", "{root}"], 1, "exists and holds other files"),
        (["merge", "{root}/base", "{root}/dense", "{root}/base/out"], 1, "is inside"),
        (["merge", "{root}/base", "{root}/cut-sparse", "{root}/out"], 1, "damaged"),
        (["merge", "{root}/dense", "{root}/dense", "{root}/out"], 1, "is an adapter and not a base model"),
        (["merge", "./nowhere", "{root}/dense", "{root}/out"], 1, "no model folder at nowhere"),
        (["analyze", "{root}/base"], 2, "Missing argument"),
        (["analyze", "./nowhere", "{root}/base"], 1, "no model folder at nowhere"),
        (["analyze", "{root}/base", "{root}/cut-sparse"], 1, "damaged"),
        (["analyze", "{root}/dense", "{root}/base"], 1, "comes first: onelayer analyze {root}/base {root}/dense"),
        (["analyze", "{root}/base", "{root}/dense", "--plot", "change.txt"], 1, "is no image"),
        (["analyze", "{root}/base", "{root}/dense", "--revision", "v1"], 1, "base is a folder here; leave it out"),
        (["compare", "{root}/dense", "{root}/sparse", "--revision", "v1"], 1, "base is a folder here; leave it out"),
        (["export", "{root}/dense", "{root}/out"], 2, "Missing option"),
        (["export", "{root}/dense", "{root}/out", "--format", "zip"], 2, "'zip' is not one of"),
        (["export", "{root}/dense", "{root}/out", "--format", "peft", "--rank", "2"], 1, "those of the format lora"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--rank", "2", "--energy", ".5"], 1, "exclude each other"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--energy", "0"], 1, "energy=0.0 is no share"),
        (["export", "{root}/dense", "{root}", "--format", "peft"], 1, "exists and holds other files"),
        (["export", "{root}/cut-dense", "{root}/out", "--format", "peft"], 1, "damaged"),
        (["export", "{root}/cut-sparse", "{root}/out", "--format", "dense"], 1, "damaged"),
        (["export", "{root}/base", "{root}/out", "--format", "peft"], 1, "adapter_config.json"),
        (["export", "./nowhere", "{root}/out", "--format", "flat"], 1, "no adapter folder at nowhere"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--base", "./nowhere"], 1, "no model folder at nowhere"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--base", "{root}/sparse"], 1, "is an adapter and not a base"),
        (["compare", "{root}/dense"], 1, "takes two or more"),
        (["vote", "{root}/dense", "--task", "sort"], 1, "a vote takes two adapters or more"),
        (["vote", "{root}/dense", "{root}/sparse"], 1, "give --task"),
        (["vote", "{root}/dense", "{root}/sparse", "--task", "sotr"], 1, "did you mean 'sort'?"),
        (["vote", "{root}/dense", "{root}/sparse", "--task", "sort", "--against", "2"], 1, "none of the 2 adapters"),
        (["vote", "{root}/dense", "{root}/sparse", "--task", "sort", "--split", "tset"], 1, "did you mean test?"),
        ([*VOTE, "--revision", "v1"], 1, "--revision v1 is for a repository on the Hub, and"),
        ([*VOTE, "--out", "{root}/base/config.json"], 1, "config.json"),
        (["entropy", "{root}/base"], 1, "give --task"),
        (["entropy", "{root}/base", "--task", "sort", "--share", "20"], 1, "give a number between 0 and 1"),
        (["entropy", "{root}/base", "--task", "sort", "--layer", "middel"], 1, 'Did you mean "middle"?'),
        (["entropy", "{root}/base", "--task", "sort", "--revision", "v1"], 1, "--revision v1 is for a repository on"),
        (["entropy", "./nowhere", "--task", "sort"], 1, "no model folder at nowhere"),
        (["compare", "{root}/dense", "{root}/base"], 1, "give the base"),
        (["trian"], 2, "Did you mean 'train'?"),
        (["resume", "run"], 2, "No such command 'resume'; here it is onelayer train --resume --out RUN; see"),
        (["evaluate", "run"], 2, "No such command 'evaluate'; here it is onelayer eval; see"),
        ([*TRAIN, "--task", "sort", "--set", "lr=3e-3"], 1, "field lr is set by --learning-rate, not by --set"),
        (["train", "{root}/base"], 2, "--out is missing; give a new folder, such as --out run"),
        (["train", "{root}/base", "--tsak", "sort"], 2, "--task"),
        (["train", "{root}/base", "--lr", "3e-3"], 2, "No such option: --lr (Possible options: --learning-rate)"),
        (["train", "{root}/base", "-lr", "3e-3"], 2, "No such option: -lr (Possible options: --learning-rate)"),
        (["train", "{root}/base", "-layer=14"], 2, "No such option: -layer (Possible options: --layer)"),
        (["train", "{root}/base", "-max_steps", "14"], 2, "No such option: -max_steps (Possible options: --steps)"),
        (["train", "{root}/base", "-taks", "sort"], 2, "No such option: -taks (Possible options: --task)"),
        (["train", "{root}/base", "-o", "run"], 2, "No such option: -o (Possible options: --out)"),
        (["train", "-help"], 2, "No such option: -help (Possible options: --help)"),
        (["-version"], 2, "No such option: -version (Possible options: --version)"),
        (["train", "{root}/base", "--lr=3e-3"], 2, "--lr (Possible options: --learning-rate)"),
        (["train", "{root}/base", "--max_steps", "3"], 2, "--max_steps (Possible options: --steps)"),
        (["train", "{root}/base", "--eval_every", "3"], 2, "--eval_every (Possible options: --eval-every)"),
        (["train", "{root}/base", "--num-generations", "4"], 2, "(Possible options: --completions)"),
        (["train", "{root}/base", "--batch-size", "4"], 2, "(Possible options: --prompts)"),
        (["train", "{root}/base", "--beta", "0.1"], 2, "(Possible options: --set beta=VALUE)"),
        (["train", "--model", "{root}/base"], 2, "(Possible options: MODEL, which is written without an option)"),
        (["merge", "--model", "{root}/base"], 2, "(Possible options: BASE, which is written without an option)"),
        (["combine", "one", "two", "--out", "x"], 2, "(Possible options: OUT, which is written without an option)"),
        (["pull", "me/x", "--out", "x"], 2, "(Possible options: FOLDER, which is written without an option)"),
        (["train", "{root}/base", "--output-dir", "x"], 2, "(Possible options: --out)"),
        (["sweep", "{root}/base", "--dataset-name", "x"], 2, "(Possible options: --dataset)"),
        (["probe", "{root}/base", "--layer", "3"], 2, "(Possible options: --layers)"),
        (["eval", "{root}/base", "--max-new-tokens", "3"], 2, "(Possible options: --max-tokens)"),
        (["train", "{root}/base", "--out", "{root}/new"], 1, "give --task, or --dataset with --reward; the tasks are"),
        ([*TRAIN, "--task", "arithmetc"], 1, "did you mean 'arithmetic'?"),
        ([*TRAIN, "--task", "{root}/task.pyy"], 1, "is not known"),
        ([*TRAIN, "--task", "{root}/tsk.py"], 1, "did you mean task.py?"),
        ([*TRAIN, "--task", "{root}/broken.py"], 1, "broken.py:1: "),
        ([*TRAIN, "--task", "sort", "--algorithm", "grop"], 1, "did you mean grpo?"),
        ([*TRAIN, "--task", "sort", "--layer", "middel"], 1, 'Did you mean "middle"?'),
        ([*TRAIN, "--task", "sort", "--method", "rase"], 1, "did you mean race?"),
        ([*TRAIN, "--task", "sort", "--keep", "bst"], 1, "did you mean best?"),
        (
            [*TRAIN, "--task", "sort", "--learning-rate", "0"],
            1,
            "--learning-rate: a learning rate must be above 0, got",
        ),
        ([*TRAIN, "--task", "sort", "--learning-rate", "-1"], 1, "a learning rate must be above 0, got -1"),
        ([*TRAIN, "--task", "sort", "--learning-rate", "nan"], 1, "a learning rate must be above 0, got nan"),
        ([*TRAIN, "--task", "sort", "--set", "learning_rate=0"], 1, "--set learning_rate: a learning rate must be"),
        ([*TRAIN, "--task", "sort", *TWO_RATES], 1, "--learning-rate and --set learning_rate say the same; give one"),
        (["probe", "{root}/base", "--task", "sort", *TWO_RATES], 1, "--learning-rate and --set learning_rate say the"),
        (["train", "--config", "{root}/zero.yaml", "--out", "{root}/new"], 1, "a learning rate must be above 0, got 0"),
        ([*TRAIN, "--task", "sort", "--full", "--layer", "3"], 1, "give one of them"),
        ([*TRAIN, "--task", "sort", "--layer", "3", "--budget", "0.5"], 1, "--budget is of a ranking, and --layer 3"),
        ([*TRAIN, "--task", "sort", "--full", "--method", "race"], 1, "--method is of a ranking, and --full ranks"),
        ([*TRAIN, "--task", "sort", "--keep", "last"], 1, "--keep chooses among the states that --eval-every"),
        ([*TRAIN, "--task", "sort", "--prefix-cache-gb", "3"], 1, "--prefix-cache-gb is of --prefix-cache"),
        (["train", "{root}/base", "--task", "sort", "--out", "/proc/x"], 1, "/proc takes no new file"),
        (["train", "{root}/base", "--task", "sort", "--out", "/proc/y/x"], 1, "/proc/y takes no new file"),
        (
            ["train", "--config", "{root}/task.py", "--out", "{root}/new"],
            1,
            "--config takes a YAML file such as run.yaml",
        ),
        (["train", "--resume"], 2, "--resume needs the run's folder, --out RUN"),
        (["train", "--out", "{root}/new"], 2, "MODEL is missing; give it, or --recipe or --config"),
        ([*TRAIN, "--task", "sort", "--layer", "4"], 1, "layer='4' is out of range: the model has 4 blocks"),
        ([*TRAIN, "--task", "sort", "--layer", "mid-5"], 1, "layer='mid-5' asks for 5 of 4 blocks"),
        ([*TRAIN, "--task", "{root}/task.py"], 1, "task.py has no function rows(split, n, seed)"),
        ([*TRAIN, "--task", "{root}/unrewarded.py"], 1, "exactly one function whose name holds 'reward'; found none"),
        ([*TRAIN, "--task", "sort", "--set", "temperature=-1"], 1, "--set temperature must be above 0 in training"),
        ([*TRAIN, "--task", "sort", "--report-to", "dvclive"], 1, "--report-to dvclive: dvclive is not installed"),
        (
            [*TRAIN, "--task", "sort", "--report-to", "dagshub"],
            1,
            "not installed; pip install dagshub mlflow, or leave",
        ),
        ([*TRAIN, "--task", "sort", "--report-to", "wnadb"], 1, "--report-to wnadb is not known; did you mean wandb?"),
        (
            [*TRAIN, "--task", "sort", "--report-to", "x,y"],
            1,
            "give none, all, or some of azure_ml, clearml, codecarbon",
        ),
        ([*TRAIN, "--task", "sort", "--report-to", "kubeflow"], 1, "is of a Kubeflow job"),
        ([*TRAIN, "--task", "sort", "--report-to", "all", "--set", "run_name=ghp_" + "Ab1" * 12], 1, "gives a secret"),
        ([*TRAIN, "--task", "sort", "--layer", "1", "--mask", "{root}/bad.jsonl"], 1, "no safetensors file"),
        ([*TRAIN, "--task", "sort", "--layer", "1", "--mask", "nowhere"], 1, "--mask nowhere: no such file; `onelayer"),
        (
            [*TRAIN, "--task", "sort", "--layer", "1", "--mask", "{root}/base/model.safetensors"],
            1,
            "which is not boolean; `onelayer analyze --mask-out` writes one",
        ),
        ([*TRAIN, "--task", "sort", "--init-adapter", "{root}/base"], 1, "base holds no adapter_config.json, so it is"),
        (["train", "{root}/weightless", "--task", "sort", "--out", "{root}/new"], 1, "weightless holds no weights"),
        ([*TRAIN, "--dataset", "{root}/rows.jsonl", *REWARD], 1, "rows.jsonl:1: no column 'prompt'; found text"),
        ([*TRAIN, "--dataset", "{root}/bad.jsonl", *REWARD], 1, "bad.jsonl:2: not one JSON object"),
        ([*TRAIN, "--dataset", "{root}/empty.jsonl", *REWARD], 1, "empty.jsonl is empty"),
        ([*TRAIN, "--dataset", "{root}/rows.csv", *REWARD], 1, "no column 'prompt'; found question, answer"),
        ([*TRAIN, "--dataset", "nowhere.jsonl", *REWARD], 1, "no file or folder nowhere.jsonl"),
        ([*TRAIN, "--algorithm", "dpo", "--layer", "1", "--dataset", "nowhere.jsonl"], 1, "no file or folder nowhere"),
        ([*TRAIN, "--algorithm", "dpo", "--layer", "1", "--dataset", "{root}/bad.jsonl"], 1, "bad.jsonl:2: not one"),
        ([*TRAIN, "--task", "sort", "--also", "sotr"], 1, "did you mean 'sort'?"),
        ([*TRAIN, "--task", "sort", "--set", "use_vllm=true"], 1, "vLLM, which is not installed"),
        ([*TRAIN, "--task", "sort", "--set", "beta"], 1, "--set takes field=value"),
        ([*TRAIN, "--algorithm", "dpo", "--task", "sort"], 1, "dpo is offline"),
        ([*TRAIN, "--task", "sort", "--prefix-cache", "c"], 1, "those that grpo generates do not"),
        ([*DPO, "--prefix-cache", "c", "--full"], 1, "and --full trains them all"),
        (
            [*DPO, "--layer", "1", "--prefix-cache", "c", "--prefix-cache-gb", "0"],
            1,
            "--prefix-cache-gb is above 0, got 0",
        ),
        ([*DPO, "--layer", "1", "--prefix-cache", "{root}/task.py"], 1, "no folder that can be written to"),
        ([*DPO, "--layer", "1", "--prefix-cache", "{root}/task.py/c"], 1, "is not a folder"),
        ([*TRAIN, "--dataset", "d.jsonl", "--reward", "{root}/task.py:my_rewrd"], 1, "did you mean my_reward?"),
        ([*TRAIN, "--recipe", "qwen3-1.7b-numna:paper"], 1, "qwen3-1.7b-numina:paper"),
        (["train", "{root}/nowhere", "--task", "sort", "--out", "{root}/new"], 1, "no model folder at"),
        (["train", "{root}/base", "--task", "sort", "--out", "{root}/dense"], 1, "holds other files"),
        (["train", "--resume", "--out", "{root}/new"], 1, "holds no run to resume"),
        (["train", "--resume", "--out", "{root}/finished"], 1, "is finished; choose a new output folder, or raise"),
        (["train", "--resume", "--out", "{root}/finished", "--steps", "1"], 1, "or raise --steps above 2 to train it"),
        (["probe", "{root}/base"], 1, "give --task"),
        (["probe", "{root}/base", "--task", "sort", "--method", "rase"], 1, "did you mean race?"),
        (["probe", "{root}/base", "--task", "sort", "--out", "ranking.txt"], 1, "takes a JSON file"),
        (["probe", "{root}/base", "--task", "sort", "--learning-rate", "0"], 1, "a learning rate must be above 0"),
        (["probe", "{root}/base", "--task", "sort", "--set", "learning_rate=0"], 1, "a learning rate must be above 0"),
        (
            ["probe", "{root}/base", "--method", "prior", "--budget", "2"],
            1,
            "--budget is of a race, and --method prior",
        ),
        (["probe", "{root}/base", "--task", "sort", "--layers", "3"], 1, "nothing to choose: --layers 3 names block 3"),
        (["probe", "{root}/base", "--task", "sort", "--layers", "3,9"], 1, "layer='3,9' is out of range"),
        (["probe", "{root}/base", "--task", "sort", "--set", "temperature=0"], 1, "--set temperature must be above 0"),
        (["eval", "{root}/weightless", "--task", "sort"], 1, "weightless holds no weights"),
        (["eval", "{root}/base", "--adapter", "{root}/base", "--task", "sort"], 1, "so it is a model and no adapter"),
        (["eval", "{root}/base", "--adapter", "{root}/cut-dense", "--task", "sort"], 1, "is damaged, incomplete or"),
        (["eval", "{root}/cut-sparse", "--task", "sort"], 1, "is damaged, incomplete or"),
        ([*VOTE, "{root}/cut-dense"], 1, "is damaged, incomplete or"),
        ([*TRAIN, "--task", "sort", "--init-adapter", "{root}/cut-dense"], 1, "is damaged, incomplete or"),
        (
            ["train", "{root}/other", "--init-adapter", "{root}/dense", "--task", "sort", "--out", "{root}/new"],
            1,
            "this is not the base that the adapter was trained on ({root}/base): its lm_head.weight holds other",
        ),
        (["eval", "{root}/other", "--adapter", "{root}/dense", "--task", "sort"], 1, "or --allow-other-base"),
        (["eval", "{root}/other", "--adapter", "{root}/sparse", "--task", "sort"], 1, "or --allow-other-base"),
        (
            ["eval", "{root}/narrow", "--adapter", "{root}/dense", "--task", "sort", "--allow-other-base"],
            1,
            "mlp.down_proj.weight has shape [32, 48] in the adapter in {root}/dense and [32, 40] in {root}/narrow",
        ),
        (
            ["eval", "{root}/shallow", "--adapter", "{root}/dense", "--task", "sort"],
            1,
            "of 4 blocks and {root}/shallow",
        ),
        (["entropy", "{root}/other", "--adapter", "{root}/dense", "--task", "sort"], 1, "or --allow-other-base"),
        (["generate", "{root}/other", "{root}/dense", "--prompt", "a"], 1, "or --allow-other-base"),
        ([*VOTE[:-1], "{root}/other"], 1, "or --allow-other-base"),
        (
            [*TRAIN, "--task", "sort", "--set", "max_step=5"],
            1,
            "has no field 'max_step'; did you mean max_steps (--steps)",
        ),
        (
            [*TRAIN, "--task", "sort", "--algorithm", "gigpo", "--set", "gama=1"],
            1,
            "GiGPOConfig has no field 'gama'; did",
        ),
        (
            [*TRAIN, "--config", "{root}/misspelt.yaml"],
            1,
            "'stpes' is no option of onelayer train and no field of GRPO",
        ),
        (
            [*TRAIN, "--task", "sort", "--config", "{root}/sampled.yaml"],
            1,
            "Sampling has no field 'tpo_p'; did you mean",
        ),
        (
            ["probe", "{root}/base", "--task", "sort", "--set", "bta=5"],
            1,
            "GRPOConfig has no field 'bta'; did you mean",
        ),
        ([*SWEEP, "--set", "bta=5"], 1, "GRPOConfig has no field 'bta'; did you mean beta"),
        (["eval", "{root}/base", "--task", "sort", "--sampling", "tpo_p=.5"], 1, "Sampling has no field 'tpo_p'; did"),
        ([*VOTE, "--sampling", "tpo_p=.5"], 1, "Sampling has no field 'tpo_p'; did"),
        (["entropy", "{root}/base", "--task", "sort", "--sampling", "tpo_p=.5"], 1, "Sampling has no field 'tpo_p'"),
        (["eval", "{root}/base", "--adapter", "./nowhere", "--task", "sort"], 1, "no adapter folder at nowhere"),
        (["eval", "{root}/base", "--adapter", "nowhere", "--task", "sort"], 1, "no adapter folder at nowhere"),
        (
            ["entropy", "{root}/base", "--adapter", "{root}/base", "--task", "sort"],
            1,
            "so it is a model and no adapter",
        ),
        (["entropy", "{root}/base", "--layer", "9", "--task", "sort"], 1, "layer='9' is out of range"),
        ([*SWEEP, "--layers", "40"], 1, "layer='40' is out of range: the model has 4 blocks"),
        (["eval", "{root}/base"], 1, "give --task"),
        (["eval", "{root}/base", "--task", "sort", "--config", "{root}/task.py"], 1, "--config takes a YAML file"),
        (["generate", "{root}/base", "--prompt", ""], 1, "--prompt holds no text"),
        (["generate", "{root}/base", "--prompt", "a", "--prompt", " "], 1, "--prompt holds no text"),
        (["eval", "{root}/moved", "--task", "sort"], 1, "onelayer eval PATH/TO/base --adapter {root}/moved"),
        (["eval", "{root}/pulled", "--task", "sort"], 1, "an adapter of the model in a folder my_model, and no such"),
        (
            ["compare", "{root}/moved", "{root}/moved"],
            1,
            "onelayer compare {root}/moved {root}/moved --base PATH/TO/base",
        ),
        (["generate", "{root}/pulled", "--prompt", "x"], 1, "onelayer generate PATH/TO/my_model {root}/pulled"),
        (["eval", "{root}/base", "--task", "sort", "--split", "tset"], 1, "did you mean test?"),
        (["eval", "{root}/dense", "--adapter", "{root}/sparse", "--task", "sort"], 1, "is an adapter itself"),
        (["sweep", "{root}/base", "--task", "sotr"], 1, "did you mean 'sort'?"),
        (["sweep", "{root}/base", "--task", "sort", "--algorithm", "dpo"], 1, "dpo is offline"),
        ([*SWEEP, "--seeds", "one"], 1, "--seeds takes whole numbers separated by commas, got 'one'"),
        ([*SWEEP, "--seeds", "1,1"], 1, "seeds must be one or more different numbers from 0, got [1, 1]"),
        ([*SWEEP, "--learning-rate", "-1"], 1, "--learning-rate: a learning rate must be above 0, got -1"),
        ([*SWEEP, "--full-learning-rate", "0"], 1, "--full-learning-rate: a learning rate must be above 0"),
        ([*SWEEP, "--search-learning-rates", "1e-5,0"], 1, "--search-learning-rates: a learning rate must be above 0"),
        ([*SWEEP, "--regimes"], 1, "give rates to choose from"),
        ([*SWEEP, "--set", "max_steps=3"], 1, "field max_steps is set by --steps"),
        ([*SWEEP, "--revision", "v1"], 1, "--revision v1 is for a repository on the Hub, and"),
        ([*SWEEP, "--engine", "slrum"], 1, "expected one of local, shared, ray, slurm; did you mean slurm?"),
        ([*SWEEP, "--early-stop"], 1, "use it with --engine ray, not local"),
        ([*SWEEP, "--out", "{root}/base"], 1, "exists and holds other files"),
        (["demo", "--task", "srot"], 1, "did you mean sort?"),
        (["demo", "--layer", "middel"], 1, 'Did you mean "middle"?'),
        (["push", "{root}/dense"], 2, "Missing argument"),
        (["pull", "{root}/dense", "me/x"], 1, "is a folder here; the repository comes first: onelayer pull ORG/NAME"),
        (["push", "{root}/dense", "not a name"], 1, "not a name"),
        (["push", "{root}/cut-dense", "me/x"], 1, "damaged"),
        (["push", "{root}/sparse", "me/x", "--dense"], 1, "is sparse already"),
        (["push", "{root}/dense", "me/x", "--eval", "nowhere.json"], 1, "no file nowhere.json"),
        (["push", "{root}/nowhere", "me/x"], 1, "no adapter folder"),
        (["pull", "me/x", "{root}/dense/adapter_model.safetensors"], 1, "is not a folder"),
        (["pull", "me/x", "{root}"], 1, "exists and holds other files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_at_once(onelayer, files, arguments, code, message):
    before = sorted(files.rglob("*"))
    token = {"HF_TOKEN": "hf_token"}
    answer = onelayer(*(argument.format(root=files) for argument in arguments), environment=token)
    assert (answer.code, answer.out, len(answer.err)) == (code, "", 1), answer
    assert answer.err[0].startswith("onelayer") and message.format(root=files) in answer.err[0], answer
    assert sorted(files.rglob("*")) == before


def test_a_push_without_a_token(onelayer, files, tmp_path):
    nobody = {"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "none"), "HF_HOME": str(tmp_path)}
    answer = onelayer("push", files / "dense", "me/x", environment=nobody)
    assert (answer.code, answer.out) == (1, ""), answer
    assert "cannot push to me/x: no token was found; log in with `hf auth login`" in answer.err[0], answer
