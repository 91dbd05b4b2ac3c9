"""The cleaner on a table of lines: secrets, what tells of this machine, and innocent text that must stay as it is.

The secrets are put together here, so that no scanner takes this file for a leak.
"""

import re

import pytest

from peft_onelayer.records.privacy import REMOVED, is_secret_name, without_private, without_secrets

RANDOM = "A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"
HEX = "0123456789abcdef" * 4
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0In0" + "." + "SflKxwRJSMeKKF2QT4"
KEY = "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEpAIBAAKCAQEA7\nq2w3e4\n-----END RSA PRIVATE" + " KEY-----"

# (text, what must not be left of it)
SECRETS = [
    *((f"{prefix}{RANDOM}", RANDOM[4:]) for prefix in ("hf_", "ghp_", "gho_", "ghs_", "github_pat_", "glpat-")),
    *((f"{prefix}{RANDOM}", RANDOM[4:]) for prefix in ("sk-", "sk-proj-", "sk-ant-api03-", "gsk_", "npm_", "xai-")),
    *((f"{prefix}{RANDOM}", RANDOM[4:]) for prefix in ("sk_" + "live_", "AIza" + "Sy", "pypi-AgE", "ya29.", "nvapi-")),
    ("the key AKIA" + "IOSFODNN7EXAMPLE is mine", "IOSFODNN7"),
    ("xoxb" + "-123456789012-abcdefGHIJ", "abcdefGHIJ"),
    (JWT, "SflKxw"),
    (f"Authorization: Bearer {RANDOM}", RANDOM),
    ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
    ("curl -H 'Authorization: token abcdefgh'", "abcdefgh"),
    (f"bearer {RANDOM}", RANDOM),
    (KEY, "q2w3e4"),
    (KEY.partition("-----END")[0], "q2w3e4"),
    ("https://me:hunter2@host.co/x", "hunter2"),
    ("redis://:p@ss@host:1", "ss@"),
    ("https://abcdefgh@github.com/me/x", "abcdefgh"),
    ("https://h.co/x?token=abc", "abc"),
    ("https://h.co/x?a=1&api_key=abc&b=2", "abc"),
    ("https://h.co/x?access_token=abc#y", "abc"),
    ("wss://h.co/?x=1;password=abc", "abc"),
    ("https://h.co/x?X-Amz-Signature=abc&X-Amz-Credential=def", "abc"),
    ("https://h.co/x?X-Amz-Signature=abc&X-Amz-Credential=def", "def"),
    ("https://h.blob.co/x?sv=2024&sig=abc%3D", "abc"),
    ("HF_TOKEN=abcd onelayer train", "abcd"),
    ("OPENAI_API_KEY=abcd", "abcd"),
    ("password='two words'", "two words"),
    ('{"token": "abcd", "device": "cuda"}', "abcd"),
    ("{'api_key': 'abcd'}", "abcd"),
    ("[hf_" + RANDOM + "]", RANDOM),
    ("`ghp_" + RANDOM + "`", RANDOM),
    ("x|ghp_" + RANDOM + "|y", RANDOM),
    ("https://hooks.slack.com/services/" + "T000/B000/XXXX", "B000"),
]
# (text, the same as it is published)
PRIVATE = [
    ("/home/me/models/qwen", "qwen"),
    ("/home/me", "~"),
    ("see /home/me for more", "see ~ for more"),
    ("/Users/me/", "~"),
    ("/root/x", "x"),
    ("/root", "~"),
    ("/mnt/home/me/x", "x"),
    ("~me/x", "x"),
    ("~me", "~"),
    ("in ~/data/x.", "in x."),
    ("../secret/x", "x"),
    ("file:///home/me/x", "x"),
    ("file://server/share/x", "x"),
    ("C:\\Users\\me\\x", "x"),
    ("C:\\Users\\me", "~"),
    ("C:/Users/me/x", "x"),
    ("D:\\my data\\x and y", "x and y"),
    ("see D:\\my data\\x, please", "see x, please"),
    ("\\\\server\\share\\x", "x"),
    ("see \\\\server\\share\\x", "see x"),
    *(
        (f"{mark}/home/me/x", f"{mark}x")
        for mark in ("[", "{", "<", "|", "`", '"', "'", "=", ":", "(", ",", "a=", "a: ")
    ),
    *((f"{mark}C:\\Users\\me\\x", f"{mark}x") for mark in ("[", "{", "<", "|", "`", '"', "'", "=", "(", ",")),
    ("[/home/me/x]", "[x]"),
    ("{/home/me/x}", "{x}"),
    ("</home/me/x>", "<x>"),
    ("|/home/me/x|", "|x|"),
    ("`/home/me/x`", "`x`"),
    ("[/home/me]", "[~]"),
    ("`/home/me/a`, `/home/me/b`", "`a`, `b`"),
    ("http://vllm.internal:8000/v1", "http://<host>/v1"),
    ("gpu-01.cluster.local", "<host>"),
    ("http://10.1.2.3:8000", "http://<host>"),
    ("vllm_server_base_url=http://192.168.0.7:8000", "vllm_server_base_url=http://<host>"),
    ("host=172.16.0.1", "host=<host>"),
    ("host 172.31.255.255.", "host <host>."),
    ("me@build.corp", "me@<host>"),
    ("data/mine.jsonl", "mine.jsonl"),
    ("tasks/mine.py:score", "mine.py:score"),
]
INNOCENT = [
    *("Qwen/Qwen3-1.7B-Base", "org/name", "and/or", "1/2", "x/y/z", "a / b", "TCP/IP", "n/a", "/think", "/no_think"),
    *("</s>", "<s>x</s></answer>", "<think>a</think></think>", "<|im_end|>", "[/INST][/SYS]", "<b>1</b></i>", "a~b/c"),
    *(
        "https://h.co/a/b",
        "https://huggingface.co/me/x/blob/main/README.md",
        "s3://bucket/key",
        "http://127.0.0.1:8000",
    ),
    *("lr=1e-5", "learning_rate=5e-06", "a: b", "x = y/z", "\\frac{1}{2}", "$\\boxed{3/4}$", "a \\\\ b", "~0.5", "~ 3"),
    *(HEX, f"sha256:{HEX}", HEX[:40], "e53f048856ff4f594e959d75785d2c2d37b678ee", f"config.json: {HEX}"),
    *("hf_hub_download", "hf_transfer", "sk-learn", "task-specific-fine-tuning-of-models-2024", "max_new_tokens=256"),
    *("eos_token=<|im_end|>", '{"pad_token": "<pad>"}', "tokens_generated=10", "token-level loss", "the secret: work"),
    *("the key idea is this", "top_k=20", "keys=a,b", "tokenizer=Qwen/Qwen3", "importance_sampling_level=token"),
    *(
        "2607.01232",
        "torch==2.13.0",
        "cublas==10.9.0.58",
        "version 10.2.89",
        "8.8.8.8",
        "172.32.0.1",
        "threading.local()",
    ),
    *("onelayer train org/base --layer 5 --set beta=0.04 --seed 1", "gsm8k", "openai/gsm8k:main", "loss_type=dr_grpo"),
    *("2026/11/26", "3/4 of them", "+3.1 points (standard error 0.9)", "a, b; c", "Bearer bonds", "basic arithmetic"),
    *(
        "What is 12/4? Answer: 3",
        "The answer is \\boxed{7}.",
        "me@h.co",
        "f(x)/g(x)",
        "./",
        "/",
        "~",
        "..",
        "C: no path",
    ),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_removed(text, secret):
    for given in (text, f"see {text} here", [text], {"a": {"b": [text]}}, {text: 1}):
        for clean in (without_secrets, without_private):
            cleaned = str(clean(given))
            assert secret not in cleaned and (REMOVED in cleaned), cleaned
    assert without_secrets(without_secrets(text)) == without_secrets(text)


@pytest.mark.parametrize(("text", "published"), PRIVATE)
def test_what_tells_of_this_machine_is_not_published(text, published):
    assert without_private([text]) == [published]
    assert without_private(published) == published  # nothing more goes the second time
    assert without_secrets(text) == text


@pytest.mark.parametrize("text", INNOCENT)
def test_innocent_text_stays(text):
    assert without_private(text) == text and without_secrets(text) == text
    if not re.match(r"[./~]", text):
        assert without_private(f"see {text} here") == f"see {text} here"


def test_a_field_is_known_by_its_name():
    secret = ["hub_token", "token", "HF_TOKEN", "access-token", "apiKey", "api_key", "wandb_api_key", "aws_secret"]
    secret += [
        "password",
        "db.password",
        "client_secret",
        "Authorization",
        "private_key",
        "ssh-key",
        "aws_access_key_id",
    ]
    harmless = [
        "eos_token",
        "pad_token",
        "max_tokens",
        "tokens_generated",
        "top_k",
        "key",
        "keys",
        "tokenizer",
        "model",
    ]
    harmless += ["importance_token_level", "add_special_tokens", "token_type", "eos_token_id", "dataset_text_field"]
    assert [name for name in secret if not is_secret_name(name)] == []
    assert [name for name in harmless if is_secret_name(name)] == []
    assert is_secret_name("some_key", RANDOM) and not is_secret_name("cache_key", HEX)
    fields = {"hub_token": "x", "model_init_kwargs": {"token": "x", "device": "x"}, "eos_token": "x", "api_key": None}
    cleaned = {**fields, "hub_token": REMOVED, "model_init_kwargs": {"token": REMOVED, "device": "x"}}
    assert without_secrets(fields) == cleaned


def test_a_command_line():
    command = (
        'onelayer train m --set hub_token=abc --token abc --set \'x={"token": "abc"}\' --out /home/me/abc --seed 1'
    )
    cleaned = without_secrets({"command": command})["command"]
    assert cleaned.count(REMOVED) == 3 and cleaned.count("abc") == 1 and cleaned.endswith("--out /home/me/abc --seed 1")
    assert "/home" not in without_private({"command": command})["command"]
    assert without_secrets({"command": "onelayer train  'm'"}) == {"command": "onelayer train  'm'"}


def test_the_token_in_use(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "anything-at-all")
    assert without_secrets(["x anything-at-all y"]) == [f"x {REMOVED} y"]


@pytest.mark.parametrize(
    "part", ["a", "/a", "a/", "a/.", "~a", "\\\\a", "C:\\a ", "hf_", "a=", "a.", "a-", "eyJ-", "10.1.", "@"]
)
def test_a_long_text_is_read_in_one_pass(part):
    """A pattern that goes back over the text would take hours."""
    text = part * (50_000 // len(part))
    assert len(without_private(text)) <= len(text)


def test_a_token_file_that_cannot_be_read_hides_no_message(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "file" / "token"))
    assert without_secrets(f"no folder; hf_{RANDOM}") == f"no folder; {REMOVED}"


def test_digests_of_a_tensor_are_no_secret_whatever_its_name():
    line = "bfloat16 2048x64 1f3a5b7c9d0e2468 0a1b2c3d4e5f6789"
    record = {"trained_on": {"rest": {"token_embedding.weight": line, "shared_key": "quantized 8x8"}}}
    assert without_private(record) == record and without_secrets(record) == record
    assert without_secrets({"api_token": line + " x"}) == {"api_token": REMOVED}


@pytest.mark.parametrize(
    ("given", "published"),
    [
        ({"vllm_server_host": "gpu-07"}, {"vllm_server_host": "<host>"}),
        ({"vllm_server_base_url": "http://gpu-07.our.org:8000"}, {"vllm_server_base_url": "<host>"}),
        ({"vllm_server_host": "0.0.0.0"}, {"vllm_server_host": "0.0.0.0"}),
        ({"vllm_server_base_url": "http://localhost:8000"}, {"vllm_server_base_url": "http://localhost:8000"}),
        ({"vllm_server_host": None}, {"vllm_server_host": None}),
        ("at http://gpu-07:8000/v1 or https://gpu-07", "at http://<host>/v1 or https://<host>"),
        ("http://gpu-07.cluster:8000", "http://<host>"),
        ("https://huggingface.co/a and http://localhost:1/b", "https://huggingface.co/a and http://localhost:1/b"),
        (
            {"command": "onelayer train m --set vllm_server_host=gpu-07 --seed 1"},
            {"command": "onelayer train m --set 'vllm_server_host=<host>' --seed 1"},
        ),
    ],
)
def test_where_a_server_runs_is_not_published(given, published):
    assert without_private(given) == published and without_private(published) == published
    assert without_secrets(given) == given
