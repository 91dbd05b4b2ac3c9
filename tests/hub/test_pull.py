"""pull: what arrives is checked before it is in place, and a stranger's repository can do no harm."""

import json

import pytest
from loopback import OTHER_TOKEN, TOKEN, Fault
from safetensors.torch import load, save

PUSHED: dict[str, bytes] = {}


@pytest.fixture
def published(hub, ask, request):
    """The adapter on the Hub as me/gsm; its files there. It is pushed once for all tests."""
    if not PUSHED:
        assert ask("push", request.getfixturevalue("adapter"), "me/gsm", "--base-model", "org/tiny").code == 0
        PUSHED.update(hub.files("me/gsm"))
    hub.add("me/gsm", dict(PUSHED))
    return hub.files("me/gsm")


def test_it_brings_the_adapters_files_and_no_others(hub, ask, published, tmp_path):
    published |= {"optimizer.pt": b"a pickle", "pytorch_model.bin": b"another", "peft/adapter_config.json": b"{}"}
    answer = ask("pull", "me/gsm", tmp_path / "here")
    assert answer.code == 0, answer.err
    brought = {p.relative_to(tmp_path / "here").as_posix() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    assert brought == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("layer_profile.json", "layer_profile.png", "reward.png", "run.json", ".eval_results/onelayer.yaml"),
    }
    assert all((tmp_path / "here" / name).read_bytes() == published[name] for name in brought)
    assert hub.seen("optimizer|pytorch_model") == 0
    assert "compared with the base when it is loaded" in answer.out  # sparse, and the base is not here
    assert ask("pull", "me/gsm", tmp_path / "here").code == 0  # an earlier pull is replaced
    (tmp_path / "here" / "notes.md").write_text("mine")
    answer = ask("pull", "me/gsm", tmp_path / "here")
    assert answer.code == 1 and "holds other files" in answer.err[0]


def test_what_was_changed_since_a_pull_or_was_never_pulled_is_not_replaced(hub, ask, published, adapter, tmp_path):
    here = tmp_path / "here"
    assert ask("pull", "me/gsm", here).code == 0
    hub.add("me/gsm", published | {"README.md": published["README.md"] + b"Theirs.\n"})
    assert ask("pull", "me/gsm", here).code == 0  # a newer one replaces it
    assert (here / "README.md").read_text().endswith("Theirs.\n")
    (here / "README.md").write_text("My own words.\n")
    own = tmp_path / "own"
    own.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # as save_pretrained leaves one
        (own / name).write_bytes((adapter / name).read_bytes())
    for folder, name in ((here, "README.md"), (own, "adapter_config.json")):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        answer = ask("pull", "me/gsm", folder)
        assert answer.code == 1 and f"{folder / name} is not what an earlier pull of me/gsm wrote" in answer.err[-1]
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("base", [None, "org/tiny"])
def test_what_to_do_next_works_from_here(hub, ask, quick, tmp_path, base):
    assert ask("push", quick, "me/gsm", *(["--base-model", base] if base else [])).code == 0
    answer = ask("pull", "me/gsm", tmp_path / "here")
    evaluated = tmp_path / "here" if base else f"PATH/TO/tiny-base --adapter {tmp_path / 'here'}"
    assert f"  onelayer eval {evaluated} --task TASK\n" in answer.out, answer


def test_with_the_base_at_hand_every_value_is_checked(hub, ask, published, base_folder, tmp_path):
    hub.add("org/tiny", {path.name: path.read_bytes() for path in base_folder.iterdir()})
    assert ask(code="from huggingface_hub import snapshot_download; snapshot_download('org/tiny')").code == 0
    answer = ask("pull", "me/gsm", tmp_path / "here", "--json")
    assert json.loads(answer.out)["values_checked"], answer.err
    tensors = load(published["adapter_model.safetensors"])
    name = min(n for n in tensors if n.endswith(".values"))
    tensors[name] = tensors[name] + 1
    published["adapter_model.safetensors"] = save(tensors)
    hub.commit(hub.repos["me/gsm"], "main", published, "tampered")
    answer = ask("pull", "me/gsm", tmp_path / "tampered")
    assert answer.code == 1 and len(answer.err) == 1 and not (tmp_path / "tampered").exists(), answer


def test_a_base_counts_as_here_with_the_weights_that_transformers_loads(hub, ask, published, base_folder, tmp_path):
    files = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    hub.add("org/tiny", files | {"consolidated.safetensors": files["model.safetensors"]})
    for name, whole in (("config.json", False), ("model.safetensors", True)):
        assert ask(code=f"from huggingface_hub import hf_hub_download; hf_hub_download('org/tiny', {name!r})").code == 0
        answer = ask("pull", "me/gsm", tmp_path / name, "--json")
        assert json.loads(answer.out)["values_checked"] is whole, answer.err


def test_a_revision(hub, ask, quick, tmp_path):
    assert ask("push", quick, "me/gsm", "--revision", "v1").code == 0
    answer = ask("pull", "me/gsm", tmp_path / "here", "--revision", "v1", "--json")
    assert json.loads(answer.out)["format"] == "onelayer-pull-1"
    assert json.loads(answer.out)["commit"] == hub.repos["me/gsm"].branches["v1"]
    answer = ask("pull", "me/gsm", tmp_path / "main")
    assert answer.code == 1 and "it holds no adapter_config.json" in answer.err[0]
    answer = ask("pull", "me/gsm", tmp_path / "main", "--revision", "v2")
    assert answer.code == 1 and "has no such revision" in answer.err[0]


@pytest.mark.parametrize(
    ("change", "token", "message"),
    [
        ({"gated": True}, OTHER_TOKEN, "it is gated; ask for access at"),
        ({"gated": True}, None, "it is gated; ask for access at"),
        ({"private": True}, OTHER_TOKEN, "has no model me/gsm that your token may see"),
        ({"private": True}, None, "has no model me/gsm that is public; if it is private, log in"),
        ({}, "hf_" + "wrong" * 5, "the Hub refused the token"),
    ],
)
def test_who_may_not(hub, ask, published, tmp_path, change, token, message):
    vars(hub.repos["me/gsm"]).update(change)
    answer = ask("pull", "me/gsm", tmp_path / "here", token=token)
    assert answer.code == 1 and len(answer.err) == 1 and message in answer.err[0], answer.err
    assert list(tmp_path.glob("here*")) == []
    assert ask("pull", "me/gsm", tmp_path / "here", token=TOKEN).code == 0


def test_a_token_that_has_expired_is_not_taken_for_a_repository_that_is_not_there(hub, ask, published, tmp_path):
    hub.expired = {TOKEN}
    answer = ask("pull", "me/gsm", tmp_path / "here")
    assert answer.code == 1 and len(answer.err) == 1 and "the Hub refused the token" in answer.err[0], answer.err


def _stranger(files, how):
    tensors = load(files["adapter_model.safetensors"])
    if how == "NaN":
        name = min(n for n in tensors if n.endswith(".values"))
        tensors[name] = tensors[name] * float("nan")
        return {"adapter_model.safetensors": save(tensors)}
    if how == "truncated":
        return {"adapter_model.safetensors": files["adapter_model.safetensors"][:-7]}
    if how == "pickle":
        return {"adapter_model.bin": files["adapter_model.safetensors"], "adapter_model.safetensors": None}
    if how == "lora":
        return {"adapter_config.json": b'{"peft_type": "LORA", "layer_indices": [1], "num_layers": 4}'}
    return {"run.json": b" " * (33 * 2**20)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("NaN", "holds NaN"),
        ("truncated", "damaged"),
        ("pickle", "holds no adapter_model.safetensors"),
        ("lora", "LORA"),
        ("huge", "run.json has 34,603,008 bytes"),
    ],
)
def test_a_strangers_repository(hub, ask, published, tmp_path, how, message):
    files = {**published, **_stranger(published, how)}
    hub.add("you/bad", {name: content for name, content in files.items() if content is not None})
    answer = ask("pull", "you/bad", tmp_path / "here")
    assert answer.code == 1 and len(answer.err) == 1 and message in answer.err[0], answer.err
    assert list(tmp_path.glob("*here*")) == []


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault("HEAD .*adapter_model", 503), Fault("GET /object", "drop"), Fault("GET /object", "lost")),
        *(Fault("GET /api/models", 500), pytest.param(Fault("GET /api/models", "hang"), marks=pytest.mark.more)),
        pytest.param(Fault("HEAD .*adapter_config", "hang"), marks=pytest.mark.more),
    ],
)
def test_a_fault_ends_right_or_in_one_line_and_the_second_try_completes(hub, ask, published, tmp_path, fault):
    hub.hang = 3.5  # longer than the client waits
    hub.faults = [Fault(fault.pattern, fault.what)]
    answer = ask("pull", "me/gsm", tmp_path / "here")
    assert hub.faults[0].times == 0
    if answer.code:
        assert answer.code == 1 and len(answer.err) == 1 and "try again" in answer.err[0], answer.err
        assert list(tmp_path.glob("*here*")) == []
        assert ask("pull", "me/gsm", tmp_path / "here").code == 0
    here = tmp_path / "here"
    assert (here / "adapter_model.safetensors").read_bytes() == published["adapter_model.safetensors"]


def test_a_stranger_cannot_steer_the_terminal(hub, ask, published, tmp_path):
    config = json.loads(published["adapter_config.json"])
    config["base_model_name_or_path"] = "\x1b[2J[bold]wiped[/nothing]"
    hub.add("you/bad", {**published, "adapter_config.json": json.dumps(config).encode()})
    answer = ask("pull", "you/bad", tmp_path / "here")
    assert answer.code == 0 and "?[2J[bold]wiped[/nothing]" in answer.out and "\x1b" not in answer.out
