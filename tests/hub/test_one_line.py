"""Whatever is asked for on the Hub and cannot be had: one line from every command, in the words of the Hub."""

from importlib.resources import files
from pathlib import Path

import pytest
from loopback import OTHER_TOKEN, TOKEN, Fault

DEMO = Path(str(files("peft_onelayer") / "demo_model"))
TASK = ["--task", "arithmetic"]
COMMANDS = {
    "train": ["train", "{repo}", *TASK, "--layer", "5", "--steps", "1", "--out", "{out}"],
    "sweep": ["sweep", "{repo}", *TASK, "--out", "{out}"],
    "probe": ["probe", "{repo}", *TASK],
    "profile": ["probe", str(DEMO), *TASK, "--method", "profile", "--profile", "{repo}"],
    "eval": ["eval", "{repo}", *TASK],
    "adapter": ["eval", str(DEMO), "--adapter", "{repo}", *TASK],
    "demo": ["demo", "--model", "{repo}", "--out", "{out}"],
    "inspect": ["inspect", "{repo}"],
    "merge": ["merge", "{repo}", "{repo}", "{out}"],
    "export": ["export", "{repo}", "{out}", "--format", "dense"],
    "pull": ["pull", "{repo}", "{out}"],
}
# the repository, the token, what goes wrong, what the line says
CASES = {
    "missing": ("org/nothing", TOKEN, None, "has no model org/nothing that your token may see"),
    "missing without a token": ("org/nothing", None, None, "has no model org/nothing that is public; if it is private"),
    "another's": ("me/private", OTHER_TOKEN, None, "has no model me/private that your token may see"),
    "gated": ("me/gated", OTHER_TOKEN, None, "it is gated; ask for access at "),
    "unauthorized": ("org/there", "hf_" + "wrong" * 5, None, "org/there"),
    "dropped": ("org/there", TOKEN, Fault("(GET|HEAD) .*", "drop", 10**6), "org/there"),
}


@pytest.fixture
def repos(hub):
    model = {path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()}
    for name, fields in {"org/there": {}, "me/gated": {"gated": True}, "me/private": {"private": True}}.items():
        hub.add(name, dict(model), **fields)
    return hub


def check(ask, repos, tmp_path, command, case):
    repo, token, fault, said = CASES[case]
    repos.faults = [fault] if fault else []
    filled = [part.replace("{repo}", repo).replace("{out}", str(tmp_path / "out")) for part in COMMANDS[command]]
    answer = ask(*filled, token=token)
    assert (answer.code, answer.out, len(answer.err)) == (1, "", 1), answer
    line = answer.err[0]
    assert line.startswith("onelayer: ") and len(line) < 700 and repo in line and "Error. (" not in line, line
    if case != "gated" or command not in ("profile", "pull"):  # which see at once that the file is not there
        assert said in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [c if c in ("train", "merge") else pytest.param(c, marks=pytest.mark.more) for c in COMMANDS]
)
def test_what_is_not_there(ask, repos, tmp_path, command):
    check(ask, repos, tmp_path, command, "missing")


@pytest.mark.more
@pytest.mark.parametrize("case", [case for case in CASES if case != "missing"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_may_not_be_had(ask, repos, tmp_path, command, case):
    check(ask, repos, tmp_path, command, case)
