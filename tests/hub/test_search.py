"""search: by base, task and layer, in the order that was asked for, over several pages."""

import json

import pytest
from loopback import OTHER_TOKEN, TOKEN, Fault


def card(base=None, layers=(1,), task="gsm8k", tags=("onelayer",)):
    listed = [*tags, *(f"layer:{layer}" for layer in layers), f"task:{task}"]
    base = f"base_model: {base}\nbase_model_relation: adapter\n" if base else ""
    return {"README.md": f"---\nlibrary_name: peft\n{base}tags: {json.dumps(listed)}\n---\n".encode()}


@pytest.fixture
def shelf(hub):
    hub.add("me/a", card("org/tiny", [1]), downloads=5, likes=1)
    hub.add("you/b", card("org/tiny", [1, 2], "sort"), downloads=50)
    hub.add("you/c", card("org/other", [2]), downloads=500)
    hub.add("you/d", card(None, [3], "sort"), downloads=0)
    hub.add("you/hidden", card("org/tiny", [1]), downloads=5000, private=True)
    hub.add("you/lora", card("org/tiny", [1], tags=("lora",)), downloads=10**6)


def ids(answer):
    assert answer.code == 0, answer.err
    answered = json.loads(answer.out)
    assert answered["format"] == "onelayer-search-1"
    return [found["repo_id"] for found in answered["adapters"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["you/c", "you/b", "me/a", "you/d"]),
        (["--base", "org/tiny"], ["you/b", "me/a"]),
        (["--task", "sort"], ["you/b", "you/d"]),
        (["--layer", "2"], ["you/c", "you/b"]),
        (["--base", "org/tiny", "--task", "gsm8k", "--layer", "1"], ["me/a"]),
        (["--sort", "likes", "--limit", "1"], ["me/a"]),
        (["--limit", "3"], ["you/c", "you/b", "me/a"]),
        (["--base", "org/none"], []),
    ],
)
def test_it_finds(shelf, ask, arguments, expected):
    assert ids(ask("search", *arguments, "--json", token=None)) == expected


def test_what_it_says(shelf, ask):
    found = json.loads(ask("search", "--task", "sort", "--json", token=OTHER_TOKEN).out)["adapters"][0]
    assert (found["base"], found["layers"], found["task"], found["downloads"]) == ("org/tiny", [1, 2], "sort", 50)
    assert "you/hidden" in ids(ask("search", "--json", token=OTHER_TOKEN))
    assert "you/hidden" not in ids(ask("search", "--json", token=TOKEN))
    table = ask("search", "--base", "org/tiny").out
    assert all(word in table for word in ("you/b", "org/tiny", "1, 2", "sort", "50"))
    nothing = ask("search", "--base", "org/none")
    assert nothing.code == 0 and nothing.out == "" and "No adapter" in nothing.err[0]


def test_a_published_adapter_is_found(hub, ask, quick):
    assert ask("push", quick, "me/gsm", "--base-model", "org/tiny").code == 0
    assert ids(ask("search", "--base", "org/tiny", "--task", "gsm8k", "--layer", "1", "--json")) == ["me/gsm"]
    assert ids(ask("search", "--layer", "2", "--json")) == []
    assert hub.repos["me/gsm"].private is False


def test_wrong_use(ask, hub):
    for arguments in (["--sort", "beauty"], ["--layer", "-1"], ["--limit", "0"]):
        answer = ask("search", *arguments)
        assert answer.code == 2 and len(answer.err) == 1, answer
    answer = ask("search", token="hf_" + "wrong" * 5)
    assert answer.code == 1 and answer.err[0].startswith("onelayer: cannot search: the Hub refused the token")


@pytest.mark.more
@pytest.mark.parametrize("what", [503, "drop", "hang"])
def test_a_fault_ends_right_or_in_one_line_and_the_second_try_completes(shelf, hub, ask, what):
    hub.hang = 3.5  # longer than the client waits
    hub.faults = [Fault("GET /api/models", what)]
    answer = ask("search", "--base", "org/tiny", "--json")
    if answer.code:
        assert answer.code == 1 and answer.out == "" and "try again" in "".join(answer.err) and len(answer.err) == 1
        answer = ask("search", "--base", "org/tiny", "--json")
    assert ids(answer) == ["you/b", "me/a"]


def test_a_stranger_cannot_steer_the_terminal(hub, ask):
    hub.add("you/bad", card("org/tiny", task=r"\e[2J[bold]x[/nothing]"))
    card_with_escape = hub.files("you/bad")["README.md"].replace(rb"\\e", rb"\u001b")
    hub.add("you/bad", {"README.md": card_with_escape})
    answer = ask("search")
    assert answer.code == 0 and "?[2J[bold]x[/nothing]" in answer.out and "\x1b" not in answer.out
