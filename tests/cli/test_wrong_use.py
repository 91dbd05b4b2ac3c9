"""Every mistake ends in one clear line and the right exit code, and leaves nothing behind."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.resources import files

import pytest
import transformers

import models
from onelayer_cli import main
from onelayer_cli.main import app


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo", "--layer", "99"], 1, "layer='99' is out of range: the model has 12 blocks"),
        (["demo", "--layer", "-13"], 1, "layer='-13' is out of range"),
        (["demo", "--layer", "middel"], 1, 'did you mean "middle"?'),
        (["demo", "--layer", "3-1"], 1, "empty range"),
        (["demo", "--layer", ""], 1, "is not understood"),
        (["demo", "--task", "poetry"], 1, "the demo knows the tasks arithmetic and sort, not 'poetry'"),
        (["demo", "--model", "./nowhere"], 1, "no model folder at nowhere"),
        (["demo", "--out", "/dev/null/out"], 1, "/dev/null is not a folder"),
        (["demo", "--seed", "abc"], 2, "--seed"),
        (["demo", "--seed", "-1"], 2, "--seed"),
        (["demo", "--steps", "0"], 2, "--steps"),
        (["demo", "--sede", "1"], 2, "No such option: --sede"),
        (["demo", "extra"], 2, "extra"),
        (["dmeo"], 2, "No such command 'dmeo'"),
        (["tasks", "extra"], 2, "it takes none; see 'onelayer tasks --help'"),
        # before a token is missed
        (["push", str(files("peft_onelayer") / "demo_model"), "me/x"], 1, "it is a model and no adapter"),
        (["doctor", "nowhere"], 1, "no folder nowhere"),
        (["search", "--base"], 2, "'--base' requires an argument; see 'onelayer search --help'"),
        (["merge", "base", "adapter"], 2, "ADAPTER...'; it takes BASE ADAPTER... OUT"),
        (
            ["demo", "\u2013layer", "7"],
            2,
            "\u2013layer begins with a dash that is not '-', as web pages write it; type --layer",
        ),
        (["report", "run", "\u2014html=x.html"], 2, "type --html; see 'onelayer report --help'"),
        (["train", "m", "\u2013-lr", "1e-3"], 2, "type --learning-rate"),
        (["demo", "\u2212h"], 2, "type --help; see 'onelayer demo --help'"),
        (["\u2013help"], 2, "type --help; see 'onelayer --help'"),
        (["generate", "none", "--prompt", "\u2013no"], 1, "none"),  # an option's value
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_and_an_exit_code(onelayer, arguments, code, message):
    ended, lines, out = onelayer(*arguments)
    assert ended == code
    assert len(lines) == 1, lines
    assert message.lower() in lines[0].lower()
    assert lines[0].startswith("onelayer")
    assert out == ""


@pytest.mark.parametrize("given", [("--seed", "abc"), ("--seed", "-1"), ("--steps", "0")], ids=" ".join)
def test_a_value_that_an_option_cannot_take_is_told_with_the_option(onelayer, given):
    """In the words of any version of Typer."""
    ended, lines, _ = onelayer("demo", *given)
    assert ended == 2 and len(lines) == 1 and all(part in lines[0] for part in given)


def _model_folders(folder):
    """Folders that are no model to train, with what the message must say."""
    bert = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    (folder / "empty").mkdir()
    transformers.BertForMaskedLM(bert).save_pretrained(folder / "masked")
    transformers.Qwen3ForSequenceClassification(models.build(num_layers=1).config).save_pretrained(
        folder / "classifier"
    )
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "strange").mkdir()
    (folder / "strange" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    for name in ("broken", "strange"):
        (folder / name / "model.safetensors").touch()
    models.build(num_layers=1).save_pretrained(folder / "weightless")
    (folder / "weightless" / "model.safetensors").unlink()
    models.build(num_layers=1).save_pretrained(folder / "tokenless")
    (folder / "file").write_text("x")
    return {
        "empty": "holds no config.json",
        "masked": "BertForMaskedLM, not a causal language model",
        "classifier": "Qwen3ForSequenceClassification, not a causal language model",
        "broken": "cannot load the model",
        "strange": "cannot load the model",
        "weightless": "holds no weights",
        "tokenless": "cannot write the task's prompts",
        "file": "no model folder",
    }


def test_a_folder_that_is_not_a_causal_lm(onelayer, tmp_path):
    for name, message in _model_folders(tmp_path).items():
        code, lines, out = onelayer("demo", "--model", tmp_path / name)
        assert (code, len(lines), out) == (1, 1, ""), (name, lines)
        assert message in lines[0] and name in lines[0], lines


def test_an_output_that_is_not_ours_is_not_touched(onelayer, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for target, message in ((theirs, "holds other files"), (tmp_path / "file", "is not a folder")):
        code, lines, _ = onelayer("demo", "--out", target)
        assert code == 1 and len(lines) == 1 and message in lines[0]
    # a demo's folder to which a file was added is not only ours any more
    (theirs / "demo.json").write_text('{"format": "onelayer-demo-1"}')
    (theirs / "adapter").mkdir()
    assert onelayer("demo", "--out", theirs)[0] == 1
    assert {p.name for p in theirs.iterdir()} == {"thesis.txt", "demo.json", "adapter"}
    assert (theirs / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_output(onelayer, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    for target in (tmp_path / "locked" / "out", tmp_path / "locked"):
        code, lines, _ = onelayer("demo", "--out", target)
        assert code == 1 and len(lines) == 1 and f"{tmp_path / 'locked'} is read-only" in lines[0]


@pytest.mark.parametrize("module", ["peft_onelayer", "onelayer_cli"])
def test_python_dash_m(module):
    done = subprocess.run([sys.executable, "-m", module, "dmeo"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("onelayer: No such command 'dmeo'. Did you mean 'demo'?")


def test_the_programs_help_cuts_no_description(onelayer):
    _, _, out = onelayer("-h")
    said = " ".join(out.split())
    for info in app.registered_commands:
        assert " ".join(info.callback.__doc__.partition("\n\n")[0].split()) in said


@pytest.mark.parametrize("name", [info.name for info in app.registered_commands])
def test_every_help_has_two_examples_that_parse(onelayer, name):
    _, _, out = onelayer(name, "--help")
    shown = [line.strip() for line in out.partition("Examples:")[2].splitlines() if line.strip()]
    assert len(shown) >= 2
    command = main.program().commands[name]
    for line in shown:
        program, called, *arguments = shlex.split(re.split(r" {3,}", line)[0])
        assert (program, called) == ("onelayer", name)
        command.make_context(name, arguments)


def test_help_and_version(onelayer):
    assert onelayer("--version")[0] == 0
    for arguments in ([], ["--help"], ["demo", "--help"]):
        code, lines, out = onelayer(*arguments)
        assert code == 0 and lines == [] and out.startswith("Usage: onelayer")


@pytest.mark.parametrize(
    ("signum", "code", "stage"),
    [
        pytest.param(signal.SIGINT, 130, "training block 5", marks=pytest.mark.more),
        pytest.param(signal.SIGTERM, 143, "training block 5", marks=pytest.mark.more),
        pytest.param(signal.SIGINT, 130, "ranking the blocks", marks=pytest.mark.more),
        pytest.param(signal.SIGTERM, 143, "ranking the blocks", marks=pytest.mark.more),
    ],
)
def test_interrupted_in_the_middle(tmp_path, signum, code, stage):
    layer = "auto" if "ranking" in stage else "5"
    command = [sys.executable, "-m", "onelayer_cli.main", "demo", "--layer", layer]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as on a terminal: a test run started in the background inherits an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        said = []
        while not said or not said[-1].startswith(stage):
            said.append(running.stderr.readline())
            assert said[-1], said  # it ended before that stage
        time.sleep(2)
        assert len(list(tmp_path.iterdir())) == 2  # the hidden folder it works in, and the lock
        running.send_signal(signum)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == code
    assert list(tmp_path.iterdir()) == []
    assert out == ""
    assert len(err.splitlines()) <= 1, err
    assert signum != signal.SIGINT or err == "onelayer: interrupted.\n"


@pytest.mark.parametrize("command", ["train", "eval", "probe", "sweep", "demo"])
def test_every_command_that_loads_a_model_may_trust_its_code(onelayer, tmp_path, command):
    model = ["--model", tmp_path / "none"] if command == "demo" else [tmp_path / "none", "--task", "arithmetic"]
    out = [] if command == "eval" else ["--out", tmp_path / "out.json"]
    code, lines, _ = onelayer(command, *model, "--trust-remote-code", *out)
    assert code == 1 and "no model folder at" in lines[-1], lines  # sweep has a line of progress before


HOLD = """
import sys, time
from pathlib import Path
from onelayer_cli import main
from peft_onelayer.records.files import staged_directory

def hold(**options):
    with staged_directory(Path(sys.argv[1])):
        print("now", flush=True)
        time.sleep(60)

main.refuse_pasted_dashes = lambda arguments, program: None
main.program = lambda: hold
main.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("signum", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_folder_that_was_made_for_the_output_goes_with_the_command(tmp_path, signum, code):
    running = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "new" / "folder" / "out"],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: [signal.signal(getattr(signal, name), signal.SIG_DFL) for name in ("SIGINT", "SIGHUP")],
    )
    try:
        assert running.stdout.readline() == b"now\n" and any((tmp_path / "new" / "folder").iterdir())
        running.send_signal(getattr(signal, signum))
        assert running.wait(timeout=60) == code
    finally:
        running.kill()
        running.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_python_remarks_on_the_users_sources_and_not_on_installed_ones(onelayer, tmp_path, monkeypatch, recwarn):
    (installed := tmp_path / "site-packages").mkdir()
    (installed / "theirs_of_this_test.py").write_text('THEIRS = 1 is "a"\n', encoding="utf-8")
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = 'import theirs_of_this_test\nOWN = 2 == (3 is "b")\ndef rows(split, n, seed): raise ValueError\n'
    (task := tmp_path / "own.py").write_text(source + "def my_reward(completions, **kwargs): ...\n", encoding="utf-8")
    code, errors, _ = onelayer("train", files("peft_onelayer") / "demo_model", "--task", task, "--out", "out")
    assert code == 1 and "own.py:3: rows raised ValueError" in errors[-1]
    remarks = [warning for warning in recwarn if warning.category is SyntaxWarning]
    assert [warning.filename for warning in remarks] == [str(task)]


@pytest.mark.parametrize("below", ["", "below"])
def test_an_error_from_a_folder_of_the_hub_that_is_none_says_what_to_set(onelayer, tmp_path, monkeypatch, below):
    (file := tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(home := file / below))

    def without_token():
        raise NotADirectoryError(20, "Not a directory", str(home / "token"))

    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", without_token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    code, lines, out = onelayer("pull", "me/x", tmp_path / "here")
    assert (code, out) == (1, ""), lines
    assert lines[-1].endswith(f"[Errno 20] Not a directory: '{home / 'token'}'; HF_HOME is {home}: set it to a folder")
