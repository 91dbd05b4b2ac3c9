"""`onelayer eval`: its figures are those of the library, and every mistake ends in one line."""

import errno
import json
import math
import shutil

import demo_model
import pytest
import run_records
import tool_policy
import torch
from changes import save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from trl.chat_template_utils import qwen3_chat_template

import models
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rollouts.evaluation import evaluate, paired_difference
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task

TASK = load_task("arithmetic")
FOLDER = demo_model.load()[0].name_or_path
SMALL = ("--problems", 40, "--samples", 2, "--seed", 3)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Saved adapters by name: good ones for the demo model, and ones that do not fit it or are damaged."""
    root = tmp_path_factory.mktemp("adapters")

    def save(name, model, config):
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.03 * torch.randn_like(parameter)
        adapted.save_pretrained(root / name)

    lora = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    save("block", demo_model.load()[0], SingleLayerConfig(layer=5, task_type="CAUSAL_LM"))
    save("lora", demo_model.load()[0], LoraConfig(**lora))
    save("wide", models.build(num_layers=12), SingleLayerConfig(layer=5, task_type="CAUSAL_LM"))
    save("shallow", models.build(num_layers=4), SingleLayerConfig(layer=1, task_type="CAUSAL_LM"))
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 160, "num_layers": 14, "vocab_size": 17}
    save("deep", models.build(**sizes), LoraConfig(**lora))
    (root / "empty").mkdir()
    shutil.copytree(root / "block", root / "run" / "adapter")
    (root / "file").write_text("x")
    for name, change in {
        "pickled": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "truncated": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08" * 20),
        "unknown": lambda folder: edit_config(folder, peft_type="NO_SUCH_TYPE"),
        "broken": lambda folder: (folder / "adapter_config.json").write_text("{"),
        "baseless": lambda folder: edit_config(folder, base_model_name_or_path=None),
    }.items():
        shutil.copytree(root / "block", root / name)
        change(root / name)
    shutil.copytree(root / "lora", root / "partial")
    tensors = load_file(root / "lora" / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, root / "partial" / "adapter_model.safetensors")
    return root


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["block", pytest.param("lora", marks=pytest.mark.more)])
def test_the_figures_are_those_of_the_library(onelayer, adapters, tmp_path, name):
    code, lines, out = onelayer(
        "eval", FOLDER, "--adapter", adapters / name, "--task", "arithmetic", *SMALL, "--json", "--out", tmp_path / "e"
    )
    assert code == 0, lines
    report = json.loads(out)
    base, tokenizer = demo_model.load()
    adapted = PeftModel.from_pretrained(demo_model.load()[0], adapters / name)
    rows = TASK.rows("test", 40, 3)
    for decoding, count in (("sampled", 2), ("greedy", 1)):
        settings = {"samples": count, "greedy": decoding == "greedy", "seed": 3, "batch_size": 64}
        before = evaluate(base, tokenizer, TASK, rows, Sampling(**settings))
        after = evaluate(adapted, tokenizer, TASK, rows, Sampling(**settings))
        assert before.scores != after.scores
        result = report["results"][decoding]
        assert (result["n"], result["samples"]) == (40, count)
        for key, evaluation in (("base", before), ("adapter", after)):
            assert result[key]["mean"] == evaluation.mean
            assert result[key]["standard_error"] == evaluation.standard_error
            assert result[key]["tokens_generated"] == evaluation.tokens_generated
        difference, error = paired_difference(after, before)
        assert result["difference"] == {"mean": difference, "standard_error": error}
        written = json.loads((tmp_path / "e").read_text())
        assert written["scores"]["base"][decoding] == list(before.scores)
        assert written["scores"]["adapter"][decoding] == list(after.scores)
    assert written["problems"] == rows
    assert {key: value for key, value in written.items() if key not in ("scores", "problems")} == report
    assert report["format"] == "onelayer-eval-1" and report["adapter"]["name"] == str(adapters / name)
    assert report["model"]["name"] == FOLDER and report["task"] == {"name": "arithmetic", "data": {}}
    assert (report["n"], report["samples"], report["temperature"], report["seed"]) == (40, 2, 1.0, 3)
    assert (report["batch_size"], report["chat"], report["max_completion_tokens"]) == (64, False, 5)
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.glob("*") if path.is_file()] == ["e"]  # and no partial file beside it


def test_the_table_and_what_may_be_left_out(onelayer, adapters):
    code, lines, out = onelayer("eval", adapters / "block", "--task", "arithmetic", *SMALL)  # the base is in its config
    assert code == 0 and len(lines) == 4, lines  # one line for each measurement
    for word in ("arithmetic", "avg@2", "greedy", "base", "adapter", "difference", " 40 ", " ± "):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out

    code, lines, out = onelayer("eval", FOLDER, "--task", "arithmetic", "--problems", 1, "--samples", 0, "--json")
    report = json.loads(out)
    assert code == 0 and len(lines) == 1 and report["adapter"] is None
    assert report["results"].keys() == {"greedy"} and report["results"]["greedy"].keys() == {"n", "samples", "base"}
    assert report["results"]["greedy"]["base"]["standard_error"] is None  # not NaN, which is no JSON
    code, _, out = onelayer("eval", FOLDER, "--task", "sort", "--problems", 1, "--samples", 1, "--no-greedy")
    assert code == 0 and "greedy" not in out and "± ?" in out and "difference" not in out


def test_what_the_completions_look_like_is_said_shown_and_kept(onelayer, adapters, tmp_path):
    kept, out = tmp_path / "kept.jsonl", tmp_path / "e.json"
    arguments = ["eval", adapters / "block", "--task", "arithmetic", "--problems", 16, "--samples", 2]
    arguments += ["--seed", 3, "--also", "sort", "--show", 2]
    arguments += ["--save-completions", kept, "--out", out]
    code, stderr, stdout = onelayer(*arguments)
    assert code == 0, stderr
    record = json.loads(out.read_text())
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(lines) == 2 * 16 * (2 + 1)  # both models, sampled and greedy
    for model in ("base", "adapter"):
        for decoding in ("sampled", "greedy"):
            mine = [line for line in lines if (line["model"], line["decoding"]) == (model, decoding)]
            figures = record["results"][decoding][model]
            assert math.fsum(line["reward"] for line in mine) / len(mine) == pytest.approx(figures["mean"])
            assert figures["completions"]["completions"] == len(mine)
            assert figures["completions"]["cut"] == sum(not line["ended"] for line in mine) / len(mine)
            length = sum(line["tokens"] for line in mine) / len(mine)
            assert figures["completions"]["mean_length"] == pytest.approx(length, abs=0.005)
            assert f"{figures['completions']['cut']:.1%}" in stdout
    assert record["problems"][lines[-1]["problem"]]["prompt"] == lines[-1]["prompt"]
    first = next(line for line in lines if line["model"] == "adapter" and line["problem"] == 0)
    assert f"  adapter:  {first['completion']}" in stderr and sum(line.startswith("prompt:") for line in stderr) == 2
    assert sum(line.strip().startswith("reward: ") for line in stderr) == 4
    assert record["also"]["sort"]["sampled"].keys() == {"n", "samples", "base", "adapter", "difference"}
    assert "sort, test split" in stdout and record["also"]["sort"]["greedy"]["n"] == 16
    alone = evaluate(
        demo_model.load()[0],
        demo_model.load()[1],
        load_task("sort"),
        load_task("sort").rows("test", 16, 3),
        Sampling(samples=2, seed=3, batch_size=64),
    )
    assert record["also"]["sort"]["sampled"]["base"]["mean"] == alone.mean

    code, stderr, _ = onelayer(*arguments[:-2], "--problems", 2)  # replaces what an evaluation wrote, and nothing else
    assert code == 0 and len(kept.read_text().splitlines()) == 2 * 2 * 3, stderr
    kept.write_text('{"prompt": "mine"}\n')
    code, stderr, _ = onelayer(*arguments[:-2])
    assert code == 1 and "is another file" in stderr[-1] and kept.read_text() == '{"prompt": "mine"}\n'


def test_the_decoding_of_a_recipe_by_its_options(onelayer):
    arguments = ["eval", FOLDER, "--task", "arithmetic", *SMALL, "--no-greedy", "--json"]
    given = ["--temperature", 0.6, "--top-p", 0.95, "--top-k", 20, "--min-p", 0.1]
    by_option, by_sampling = (
        json.loads(onelayer(*arguments, *more)[2])
        for more in (given, ["--sampling", "top_p=0.95", "--sampling", "top_k=20", *given[:2], *given[-2:]])
    )
    assert {n: by_option["sampling"][n] for n in ("temperature", "top_p", "top_k", "min_p")} == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
    }
    assert by_option["sampling"] == by_sampling["sampling"]
    assert by_option["results"]["sampled"]["base"]["mean"] == by_sampling["results"]["sampled"]["base"]["mean"]
    code, lines, _ = onelayer(*arguments, "--top-k", 3, "--sampling", "top_k=4")
    assert code == 1 and "top_k is given twice" in lines[-1]
    code, lines, _ = onelayer(*arguments, "--also", "arithmetic")
    assert code == 1 and "--also arithmetic is measured already" in lines[-1]


@pytest.mark.more
def test_chat_prompts_where_the_tokenizer_has_a_template(onelayer, tmp_path):
    model, tokenizer = demo_model.load()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # so that both agree
    model.save_pretrained(tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    reports = {}
    for flag in ("--chat", "--plain", None):
        code, lines, out = onelayer(
            "eval", tmp_path / "chatty", "--task", "arithmetic", *SMALL, "--json", *([flag] if flag else [])
        )
        assert code == 0, lines
        reports[flag] = json.loads(out)
    assert [reports[flag]["chat"] for flag in reports] == [True, False, True]
    means = [[result["base"]["mean"] for result in report["results"].values()] for report in reports.values()]
    assert means[0] == means[1] == means[2] and not math.isnan(means[0][0])


def test_a_users_own_data_and_reward(onelayer, tmp_path):
    rows = [{"prompt": f"A{i}{i}{i}+085=", "answer": "0432."} for i in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(
        "def digits_reward(prompts, completions, answer, **kwargs):\n"
        "    return [completion.count('0') / len(expected) for completion, expected in zip(completions, answer)]\n"
    )
    arguments = ("--dataset", tmp_path / "test.jsonl", "--reward", f"{tmp_path / 'own.py'}:digits_reward")
    code, lines, out = onelayer("eval", FOLDER, *arguments, "--max-tokens", 5, "--json")
    assert code == 0, lines
    report = json.loads(out)
    assert report["n"] == 5 and any("has 5 problems" in line for line in lines)
    assert set(report["task"]["data"]) == {"test.jsonl", "own.py"}
    assert 0 < report["results"]["sampled"]["base"]["mean"] < 1


ENVIRONMENT = '''
class Counter:
    def reset(self, target, **row):
        self.target, self.total = target, 0

    def add(self, n: int) -> str:
        """
        Add to the counter.

        Args:
            n: what to add.
        """
        self.total += n
        return str(self.total)


environment_factory = Counter


def rows(split, n, seed):
    return [{"prompt": "Count", "target": target} for target in range(1, n + 1)]


def total_reward(prompts, completions, target, environments, **kwargs):
    return [environment.total / goal for environment, goal in zip(environments, target)]
'''


def test_a_task_with_an_environment(onelayer, tmp_path):
    model, tokenizer = tool_policy.load()
    tokenizer.chat_template = qwen3_chat_template
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "count.py").write_text(ENVIRONMENT)
    arguments = ("--task", tmp_path / "count.py", "--problems", 3, "--samples", 2, "--max-tokens", 200, "--json")
    code, lines, out = onelayer("eval", tmp_path / "model", *arguments)
    assert code == 0, lines
    assert json.loads(out)["results"]["sampled"]["base"]["mean"] > 0  # the tool was called
    code, lines, _ = onelayer("eval", tmp_path / "model", *arguments, "--plain")
    assert code == 1 and "needs chat prompts" in lines[-1], lines


def test_another_base_of_the_same_shape_is_named(onelayer, adapters, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "copy")
    arguments = ("eval", tmp_path / "copy", "--adapter", adapters / "block", "--task", "sort", "--problems", 2)
    code, lines, _ = onelayer(*arguments, "--samples", 0)
    assert code == 0
    assert any(f"the adapter was trained on {FOLDER}" in line and str(tmp_path / "copy") in line for line in lines)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no adapter folder at"),
        ("run", "did you mean"),
        ("file", "no adapter folder at"),
        ("empty", "holds no adapter_config.json"),
        ("pickled", "holds no adapter_model.safetensors"),
        ("truncated", "is damaged, incomplete or no safetensors file"),
        ("broken", "is not JSON"),
        ("unknown", "does not load"),
        ("wide", "has shape [32] in the adapter"),
        ("shallow", "4 blocks"),
        ("deep", "weights that"),
        ("partial", "missing adapter keys"),
    ],
)
def test_an_adapter_that_does_not_fit(onelayer, adapters, tmp_path, name, message):
    code, lines, out = onelayer(
        "eval", FOLDER, "--adapter", adapters / name, "--task", "arithmetic", "--problems", 2, "--samples", 0,
        "--out", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 1 and out == "" and not (tmp_path / "e.json").exists()
    assert message in lines[-1] and lines[-1].startswith("onelayer: ") and len(lines[-1]) < 700, lines
    assert name in lines[-1] and len(lines) == 1, lines  # before anything was measured


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["./nowhere", "--task", "arithmetic"], 1, "no model folder at nowhere"),
        ([FOLDER], 1, "give --task, or --dataset with --reward"),
        ([FOLDER, "--dataset", "d.jsonl"], 1, "give --task, or --dataset with --reward"),
        ([FOLDER, "--reward", "r.py:f"], 1, "give --task, or --dataset with --reward"),
        ([FOLDER, "--task", "sort", "--dataset", "d.jsonl"], 1, "not both"),
        ([FOLDER, "--task", "poetry"], 1, "task 'poetry' is not known"),
        ([FOLDER, "--task", "sort", "--split", "validation"], 1, "split must be 'train' or 'test'"),
        ([FOLDER, "--task", "sort", "--chat"], 1, "use --plain"),
        ([FOLDER, "--task", "sort", "--max-tokens", "60"], 1, "context of 64 tokens"),
        ([FOLDER, "--task", "sort", "--samples", "0", "--no-greedy"], 1, "nothing to measure"),
        ([FOLDER, "--task", "sort", "--samples", "0", "--top-p", "0.9"], 1, "--top-p is of sampling, and --samples 0"),
        ([FOLDER, "--task", "sort", "--temperature", "0"], 1, "must be above 0"),
        ([FOLDER, "--task", "sort", "--out", f"{__file__}/e.json"], 1, "is not a folder"),
        ([FOLDER, "--task", "sort", "--out", "."], 1, "is a folder"),
        ([FOLDER, "--task", "sort", "--out", __file__], 1, "exists and is another file"),
        ([FOLDER, "--task", "sort", "--problems", "0"], 2, "--problems"),
        ([FOLDER, "--task", "sort", "--samples", "-1"], 2, "--samples"),
        ([FOLDER, "--task", "sort", "--batch-size", "0"], 2, "--batch-size"),
        ([FOLDER, "--tsak", "sort"], 2, "No such option: --tsak"),
        ([], 2, "Missing argument 'model'"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_one_line_and_an_exit_code(onelayer, arguments, code, message):
    ended, lines, out = onelayer("eval", *arguments)
    assert (ended, out) == (code, "")
    assert message in lines[-1] and lines[-1].startswith("onelayer"), lines
    assert all(line.endswith("...") for line in lines[:-1]), lines


def test_which_is_the_base(onelayer, adapters):
    code, lines, _ = onelayer("eval", adapters / "block", "--adapter", adapters / "lora", "--task", "sort")
    assert code == 1 and len(lines) == 1 and "is an adapter itself" in lines[0]
    code, lines, _ = onelayer("eval", adapters / "baseless", "--task", "sort")
    assert code == 1 and len(lines) == 1 and "does not name its base model" in lines[0]


def test_an_adapter_that_the_hub_does_not_have(onelayer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, lines, out = onelayer("eval", FOLDER, "--adapter", "nobody/nothing", "--task", "sort")
    assert code == 1 and out == "" and len(lines) == 1
    assert "nobody/nothing is neither an adapter folder here nor found on the Hub" in lines[0]


def test_a_full_disk_does_not_take_the_figures(onelayer, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("peft_onelayer.runs.evaluation.write_whole", full)
    arguments = ("--task", "sort", "--problems", 3, "--samples", 0, "--out", tmp_path / "e.json")
    code, lines, out = onelayer("eval", FOLDER, *arguments)
    assert code == 1 and "sort, test split" in out and "there is no room in" in lines[-1]


def test_an_evaluation_beside_the_adapter_is_in_its_card(onelayer, adapters, tmp_path):
    shutil.copytree(adapters / "block", tmp_path / "run")
    arguments = ("--task", "sort", "--problems", 3, "--samples", 0, "--out", tmp_path / "run" / "eval.json")
    code, lines, _ = onelayer("eval", tmp_path / "run", *arguments)
    assert code == 0 and lines[-1].endswith("README.md says it too")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| greedy | 3 |" in card and "No evaluation is recorded" not in card and "## Example" in card
    (example, *_) = json.loads((tmp_path / "run" / "eval.json").read_text())["examples"]
    assert example["prompt"] in card and example["decoding"] == "greedy"


def test_the_problems_that_chose_the_step_are_counted_wherever_the_gain_is_shown(onelayer, tmp_path):
    save_adapter(tmp_path / "run", FOLDER, 5, seed=0, size=0.1, share=1.0)
    (tmp_path / "run" / "run.json").write_text(run_records.choosing(5).to_json())
    out = tmp_path / "run" / "eval.json"
    given = ("--task", "arithmetic", "--problems", 8, "--samples", 2, "--out", out)
    code, lines, shown = onelayer("eval", tmp_path / "run", *given)
    assert code == 0, lines
    results = json.loads(out.read_text())["results"]
    rest = [
        f"{results[mode]['unwatched']['mean']:+.4f} ± {results[mode]['unwatched']['standard_error']:.4f}"
        for mode in ("sampled", "greedy")
    ]
    said = "5 of the 8 problems chose the step whose state was kept, so that their scores are on the high side"
    assert f"{said}; on the other 3 the difference is {rest[0]} (avg@2), {rest[1]} (greedy)." in " ".join(shown.split())
    assert f"{said}; on the other 3 the difference is {rest[0]} (avg@2" in (tmp_path / "run" / "README.md").read_text()
    _, _, shown = onelayer("report", tmp_path / "run")
    assert f"{said}; on the other 3 the difference is {rest[0]} (sampled)." in " ".join(shown.split())
    onelayer("report", tmp_path / "run", tmp_path / "run", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count(said) == 6 and f"is {rest[1]} (arithmetic, greedy)." in page  # side by side, and in both sections
    code, _, shown = onelayer("eval", tmp_path / "run", *given[:2], "--problems", 4, "--samples", 0)
    assert "4 of the 4 problems chose the step whose state was kept" in shown and "other" not in shown


def test_an_evaluation_is_replaced_by_a_later_one(onelayer, tmp_path):
    for seed in (0, 1):
        arguments = ("--task", "sort", "--problems", 3, "--samples", 0, "--seed", seed, "--out", tmp_path / "e.json")
        assert onelayer("eval", FOLDER, *arguments)[0] == 0
        assert json.loads((tmp_path / "e.json").read_text())["seed"] == seed
    code, *_ = onelayer("eval", FOLDER, "--task", "sort", "--max-tokens", 60, "--out", tmp_path / "e.json")
    assert code == 1 and json.loads((tmp_path / "e.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["e.json"]
