"""push, against a Hub that speaks the real protocol: what goes up, what never does, and every way it can fail."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from loopback import TOKEN, Fault
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

FILES = {
    ".gitattributes",
    *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    *("layer_profile.json", "layer_profile.png", "reward.png", "run.json", ".eval_results/onelayer.yaml"),
}
QUICK_FILES = FILES - {"layer_profile.json", "layer_profile.png", "reward.png"}


def only_line(answer, code=1):
    assert answer.code == code, answer
    assert answer.out == "" and len(answer.err) == 1 and answer.err[0].startswith("onelayer: cannot"), answer.err
    return answer.err[0]


def test_one_commit_with_the_adapter_its_card_and_its_records(hub, ask, adapter, base_folder):
    answer = ask("push", adapter, "me/gsm", "--message", "first")
    assert answer.code == 0, answer.err
    files = hub.files("me/gsm")
    assert set(files) == FILES
    repo = hub.repos["me/gsm"]
    assert list(repo.messages.values()) == ["initial commit", "first"] and not repo.private
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "SINGLE_LAYER" and config["layer_indices"] == [1]
    assert config["base_model_name_or_path"] == "tiny-base"
    assert files["layer_profile.png"].startswith(b"\x89PNG")
    assert f"{len(files['adapter_model.safetensors']):,}" in answer.out  # the table says what went up
    assert f"{hub.url}/me/gsm/commit/{repo.branches['main']}" in answer.out


def test_nothing_of_this_machine_and_no_secret_goes_up(hub, ask, adapter, base_folder):
    assert ask("push", adapter, "me/gsm").code == 0
    for name, content in hub.files("me/gsm").items():
        for private in (TOKEN, str(adapter), str(adapter.parent.name), str(base_folder.parent), "/tmp"):
            assert private.encode() not in content, (name, private)
    run = json.loads(hub.files("me/gsm")["run.json"])
    assert run["command"] == (
        "onelayer train tiny-base --layer auto --task gsm8k --out adapter --set 'hub_token=<removed>' --seed 7"
    )
    assert run["settings"]["config"] == {
        "learning_rate": 5e-6,
        "logging_dir": "logs",
        "hub_token": "<removed>",
        "beta": 0.001,
    }
    assert all(not carried for method, path, carried in hub.requests if path.startswith(("/upload", "/object")))


@pytest.mark.more
def test_sparse_where_the_base_is_here_and_dense_where_not_or_wished(hub, ask, adapter):
    size = (adapter / "adapter_model.safetensors").stat().st_size
    sparse = ask("push", adapter, "me/sparse", "--json")
    assert json.loads(sparse.out)["encoding"] == "sparse"
    assert len(hub.files("me/sparse")["adapter_model.safetensors"]) < size / 4
    dense = ask("push", adapter, "me/dense", "--dense", "--json")
    assert json.loads(dense.out)["encoding"] == "dense"
    assert hub.files("me/dense")["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/elsewhere"}))
    absent = ask("push", adapter, "me/absent", "--json")
    assert json.loads(absent.out)["encoding"] == "dense"
    assert absent.err[0] == (
        "the base org/elsewhere is not on this machine as safetensors, so the adapter goes up dense; download it to "
        "publish sparse"
    )


@pytest.mark.more
def test_a_base_that_was_a_folder_gets_its_hub_id(hub, ask, adapter):
    answer = ask("push", adapter, "me/gsm")
    assert "--base-model" in answer.err[0] and b"base_model:" not in hub.files("me/gsm")["README.md"]
    answer = ask("push", adapter, "me/gsm", "--base-model", "org/tiny")
    assert answer.err == []
    files = hub.files("me/gsm")
    metadata = ModelCard(files["README.md"].decode()).data
    assert (metadata.base_model, metadata.base_model_relation) == ("org/tiny", "adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"


def test_a_dry_run_shows_what_would_go_up_and_asks_the_hub_nothing(hub, ask, adapter):
    answer = ask("push", adapter, "me/gsm", "--dry-run", "--json", token=None)
    shown = json.loads(answer.out)
    assert shown["format"] == "onelayer-push-1"
    assert hub.requests == [] and hub.repos == {}
    assert (shown["endpoint"], shown["repo_id"], shown["revision"]) == (hub.url, "me/gsm", "main")
    assert ask("push", adapter, "me/gsm").code == 0
    files = hub.files("me/gsm")
    assert shown["files"] == {name: len(files[name]) for name in FILES - {".gitattributes"}}
    assert "nothing was sent" in ask("push", adapter, "me/gsm", "--dry-run").out


@pytest.mark.more
def test_private_a_branch_and_a_pull_request(hub, ask, adapter):
    assert ask("push", adapter, "me/gsm", "--private", "--revision", "try").code == 0
    assert hub.repos["me/gsm"].private
    assert set(hub.files("me/gsm")) == {".gitattributes"} and set(hub.files("me/gsm", "try")) == FILES
    answer = ask("push", adapter, "me/gsm", "--create-pr", "--json")
    assert json.loads(answer.out)["pull_request"] == f"{hub.url}/me/gsm/discussions/1"
    assert set(hub.files("me/gsm")) == {".gitattributes"} and set(hub.files("me/gsm", "refs/pr/1")) == FILES
    # a pull request is how one proposes an adapter to somebody else
    hub.add("you/gsm", {".gitattributes": b""})
    assert ask("push", adapter, "you/gsm", "--create-pr").code == 0
    assert set(hub.files("you/gsm", "refs/pr/1")) == FILES


def test_a_second_push_sends_what_changed_and_removes_what_is_no_longer_true(hub, ask, adapter):
    assert ask("push", adapter, "me/gsm").code == 0
    before = len(hub.requests)
    again = ask("push", adapter, "me/gsm")
    assert again.code == 0 and len(hub.repos["me/gsm"].commits) == 2  # the same files are no commit
    assert not any(path.startswith("/upload") for _, path, _ in hub.requests[before:])
    hub.repos["me/gsm"].commits[hub.repos["me/gsm"].branches["main"]]["notes.md"] = b"somebody's"
    for name in ("layer_profile.json", "eval.json"):
        (adapter / name).unlink()
    assert ask("push", adapter, "me/gsm").code == 0
    gone = {"layer_profile.json", "layer_profile.png", ".eval_results/onelayer.yaml"}
    assert set(hub.files("me/gsm")) == (FILES - gone) | {"notes.md"}


def test_another_base_is_answered_with_what_push_has(ask, quick, base_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    tensors = load_safetensors((other / "model.safetensors").read_bytes())
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    config = json.loads((quick / "adapter_config.json").read_text())
    (quick / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    answer = ask("push", quick, "me/gsm", "--dry-run")
    assert (answer.code, answer.out) == (1, "") and "is not the base that" in answer.err[-1], answer
    assert answer.err[-1].endswith(". --dense publishes it without a look at the base."), answer.err
    assert "allow_other_base" not in answer.err[-1]
    assert ask("push", quick, "me/gsm", "--dry-run", "--dense").code == 0


def test_private_is_kept_or_refused(hub, ask, quick):
    hub.add("me/public", {".gitattributes": b""})
    assert "it exists and is public" in only_line(ask("push", quick, "me/public", "--private"))
    assert set(hub.files("me/public")) == {".gitattributes"}


def test_the_folder_above_or_none(ask, quick, hub):
    quick.rename(quick.parent / "above")
    (quick.parent / "run").mkdir()
    (quick.parent / "above").rename(quick.parent / "run" / "adapter")
    answer = ask("push", quick.parent / "run", "me/gsm")
    assert answer.code == 1 and len(answer.err) == 1 and "did you mean" in answer.err[0], answer
    answer = ask("push", quick.parent / "nothing", "me/gsm")
    assert answer.code == 1 and len(answer.err) == 1 and "no adapter folder at" in answer.err[0], answer
    assert hub.requests == []


def test_large_files_in_parts(hub, ask, adapter):
    hub.parts_of = 10_000
    assert ask("push", adapter, "me/gsm", "--dense").code == 0
    assert hub.seen("^PUT /upload/.*/2$") == 1
    assert hub.files("me/gsm")["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["me/gsm"], None, "no token was found"),
        (["me/gsm"], "hf_" + "wrong" * 5, "the Hub refused the token"),
        (["you/gsm"], TOKEN, "You don't have the rights to create a model under the namespace 'you'"),
        (["you/theirs"], TOKEN, "You don't have the rights to write to this repository"),
        (["me/model"], TOKEN, "it exists and holds other files (config.json, model.safetensors)"),
        (["me/lora"], TOKEN, "it exists and holds an adapter of another kind (LORA)"),
        (["not a name"], TOKEN, "not a name"),
    ],
)
def test_who_may_not(hub, ask, quick, arguments, token, message):
    hub.add("you/theirs", {".gitattributes": b""})
    hub.add("me/model", {"config.json": b"{}", "model.safetensors": b"x", "README.md": b"---\nlicense: mit\n---\n"})
    hub.add("me/lora", {"adapter_config.json": b'{"peft_type": "LORA"}'})
    before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
    answer = ask("push", quick, *arguments, token=token)
    assert message in only_line(answer)
    assert {name: repo.branches for name, repo in hub.repos.items()} == before


def test_a_wrong_token_is_said_before_the_adapter_is_read(hub, ask, quick):
    (quick / "adapter_model.safetensors").write_bytes(b"damaged")
    line = only_line(ask("push", quick, "me/gsm", token="hf_" + "wrong" * 5))
    assert "the Hub refused the token" in line and "log in with" in line
    assert [path for _, path, _ in hub.requests] == ["/api/whoami-v2"]


def test_a_name_without_an_owner_is_ones_own_and_said_before_anything_is_sent(hub, ask, quick):
    hub.faults = [Fault("/api/repos/create", 503)]
    first, last = ask("push", quick, "gsm").err
    assert first == f"gsm names no owner, so it goes to {hub.url}/me/gsm" and "try again" in last
    assert ask("push", quick, "gsm").code == 0
    assert b'"me/gsm"' in hub.files("me/gsm")["README.md"]


def test_a_hub_that_does_not_say_whose_the_token_is_is_pushed_to_all_the_same(hub, ask, quick):
    hub.faults = [Fault("/api/whoami-v2", 429)]
    answer = ask("push", quick, "gsm")
    assert (answer.code, set(hub.files("me/gsm"))) == (0, QUICK_FILES), answer.err


def test_a_token_that_may_only_read(hub, ask, quick):
    hub.readers = {"me"}
    assert "the token has no right to do that" in only_line(ask("push", quick, "me/gsm"))


CREATE, CARD, COMMIT = "/api/repos/create", "/api/validate-yaml", "/api/models/me/gsm/commit"


@pytest.mark.parametrize(
    ("step", "what"),
    [
        pytest.param(
            step,
            what,
            marks=pytest.mark.slow if what == "hang" else [] if (step, what) == (COMMIT, "lost") else pytest.mark.more,
        )
        for step in (CREATE, CARD, COMMIT)
        for what in (503, "drop", "lost", "hang")
    ],
)
def test_one_line_and_the_second_try_completes(hub, ask, quick, step, what):
    hub.hang = 3.5  # the client waits three seconds
    hub.faults = [Fault(step, what)]
    line = only_line(ask("push", quick, "me/gsm"))
    assert "try again" in line, line
    uploads = hub.seen("^PUT /upload")
    answer = ask("push", quick, "me/gsm")
    assert answer.code == 0, answer.err
    assert set(hub.files("me/gsm")) == QUICK_FILES
    assert hub.seen("^PUT /upload") == 1 and uploads == ("commit" in step)  # the weights were not sent twice
    assert len(hub.repos["me/gsm"].commits) == 2


@pytest.mark.more
@pytest.mark.parametrize(("step", "what"), [("PUT /upload", "drop"), ("PUT /upload", 500), ("/objects/batch", 502)])
def test_a_fault_that_passes_is_not_even_seen(hub, ask, quick, step, what):
    hub.faults = [Fault(step, what)]
    answer = ask("push", quick, "me/gsm", "--base-model", "org/tiny")
    assert (answer.code, answer.err) == (0, [])
    assert set(hub.files("me/gsm")) == QUICK_FILES


@pytest.mark.slow
@pytest.mark.parametrize("what", ["drop", 503])
def test_a_fault_that_stays_ends_in_one_line(hub, ask, quick, what):
    hub.faults = [Fault("PUT /upload", what, times=6)]  # huggingface_hub tries six times, 23 s in all
    assert "try again" in only_line(ask("push", quick, "me/gsm"))
    assert set(hub.files("me/gsm")) == {".gitattributes"}
    assert ask("push", quick, "me/gsm").code == 0
    assert set(hub.files("me/gsm")) == QUICK_FILES


def test_no_network(ask, quick):
    with socket.socket() as nobody:  # a port where nobody listens
        nobody.bind(("127.0.0.1", 0))
        code = f"""
import sys
from huggingface_hub import constants
from onelayer_cli.main import main
endpoint, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:{nobody.getsockname()[1]}"
sys.argv = ["onelayer", "push", {str(quick)!r}, "me/gsm"]
try:
    main()
finally:
    constants.ENDPOINT = endpoint
"""
        assert "cannot be reached (ConnectError" in only_line(ask(code=code))


@pytest.mark.slow
def test_offline(_server, quick):
    environment = _server.environment | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "onelayer_cli.main", "push", str(quick), "me/gsm"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and "HF_HUB_OFFLINE is set" in line and TOKEN not in line


def _break(folder, how):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "NaN":
        tensors = load_safetensors(weights.read_bytes())
        tensors[min(tensors)].flatten()[0] = float("nan")
        save_file(tensors, weights)
        (folder / "eval.json").unlink()  # which measured other weights
    elif how == "another method":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA"}))
    elif how == "eval of another":
        evaluation = json.loads((folder / "eval.json").read_text())
        evaluation["adapter"]["sha256"] = "0" * 64
        (folder / "eval.json").write_text(json.dumps(evaluation))
    elif how == "eval of the base":
        evaluation = json.loads((folder / "eval.json").read_text())
        for result in evaluation["results"].values():
            del result["adapter"], result["difference"]
        (folder / "eval.json").write_text(json.dumps(evaluation | {"adapter": None}))
    elif how == "half a run":
        run = json.loads((folder / "run.json").read_text())
        del run["settings"]["model"]
        (folder / "run.json").write_text(json.dumps(run))
    elif how == "half an eval":
        evaluation = json.loads((folder / "eval.json").read_text())
        evaluation["results"]["greedy"]["adapter"]["mean"] = "good"
        (folder / "eval.json").write_text(json.dumps(evaluation))
    elif how == "command":
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(run | {"command": "onelayer 'train"}))
    elif how == "run.json":
        (folder / "run.json").write_text('{"format": "theirs"}')
    elif how == "profile":
        (folder / "layer_profile.json").write_text("[]")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "damaged"),
        ("NaN", "NaN"),
        ("another method", "LORA"),
        ("eval of another", "measured another adapter"),
        ("eval of the base", "measured the base alone"),
        ("run.json", 'run.json is no record of a training run: its "format" is theirs, expected "onelayer-run-1"'),
        ("half a run", "run.json: settings.model is missing, expected an object"),
        ("half an eval", "eval.json: results.greedy.adapter.mean is good, expected a number"),
        ("command", "a record's command is no command line (No closing quotation): onelayer 'train"),
        ("profile", "layer_profile.json holds no fields: expected a JSON object"),
    ],
)
def test_what_is_not_right_stays_here(hub, ask, adapter, how, message):
    _break(adapter, how)
    answer = ask("push", adapter, "me/gsm")
    assert answer.code == 1 and len(answer.err) == 1 and message in answer.err[0], answer.err
    assert [path for _, path, _ in hub.requests] == ["/api/whoami-v2"]
