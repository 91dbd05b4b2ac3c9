"""Prompts as messages where they are asked for, and prompts that a tokenizer has no tokens for."""

import re

import demo_model
import pytest

from peft_onelayer.rollouts.prompts import Shape, check_prompt, shaped
from peft_onelayer.tasks import Shown, Task, load_task

TASK = load_task("arithmetic")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def demo_tokenizer():
    return demo_model.load()[1]


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(("chat", "expected"), [(None, True), (True, True), (False, False)])
def test_a_chat_template_makes_messages_unless_plain_is_asked_for(chat_tokenizer, chat, expected):
    task, is_chat = shaped(TASK, chat_tokenizer, Shape(chat))
    assert is_chat is expected
    plain, given = TASK.rows("test", 3, 0), task.rows("test", 3, 0)
    if not expected:
        assert given == plain
        return
    assert [row["prompt"] for row in given] == [[{"role": "user", "content": row["prompt"]}] for row in plain]
    assert [row["answer"] for row in given] == [row["answer"] for row in plain]
    assert shaped(task, chat_tokenizer, Shape(True))[0].rows("test", 3, 0) == given  # messages stay as they are


@pytest.mark.parametrize("chat", [None, False])
def test_without_a_chat_template_prompts_stay_plain(demo_tokenizer, chat):
    assert shaped(TASK, demo_tokenizer, Shape(chat)) == (TASK, False)


def test_messages_without_a_chat_template_are_refused(demo_tokenizer):
    with pytest.raises(ValueError, match="needs a chat template, and the model's tokenizer has none"):
        shaped(TASK, demo_tokenizer, Shape(True))


def test_a_prompt_without_tokens_is_refused_with_its_beginning(demo_tokenizer, tokenizer):
    row = TASK.rows("test", 1, 0)[0]
    check_prompt(row, demo_tokenizer, "demo")
    check_prompt({"prompt": ""}, demo_tokenizer, "demo")
    for prompt in ("What is 3 + 4?", [{"role": "user", "content": "What is 3 + 4?"}]):
        with pytest.raises(ValueError, match=r"tokenizer of demo cannot write .* such as 'What is 3 \+ 4\?'"):
            check_prompt({"prompt": prompt}, demo_tokenizer, "demo")
    with pytest.raises(ValueError, match="cannot write the task's prompts"):
        check_prompt(row, tokenizer, "other")  # has no token for "="


# --- system texts and shown problems ---

ROLES = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ROLES
)
NEEDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    + ROLES
    + "<think>\n"
)
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
THINKS = ROLES + "{% if add_generation_prompt and not quiet %}<think>\n{% endif %}"
NEEDS_TOOLS = "{{ tools | length }}" + ROLES


class Echo:
    """A task that keeps what its reward is given."""

    def __init__(self, rows, shown=None, **more):
        self.seen = []
        self.task = Task(
            "echo",
            lambda split, n, seed: [dict(row) for row in rows[:n]],
            self.reward,
            8,
            answer=str.strip,
            shown=shown,
            **more,
        )

    def reward(self, prompts, completions, **kwargs):
        self.seen += completions
        return [1.0] * len(completions)


def worked(row):
    return row["answer"]


SHOWN = Shown(lambda row: f"Q: {row['prompt']}\nA:", lambda row: f" {row['answer']}", worked, end="\nQ:")
ROWS = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(5)]


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def test_plain_prompts_show_solved_problems_and_train_on_others(demo_tokenizer):
    given, chat = shaped(TASK, demo_tokenizer, Shape(shots=2))
    first, second = TASK.rows("train", 2, 1234)
    ahead = first["prompt"] + first["answer"] + second["prompt"] + second["answer"]
    rows, plain = given.rows("test", 3, 0), TASK.rows("test", 3, 0)
    assert not chat and [row["prompt"] for row in rows] == [ahead + row["prompt"] for row in plain]
    assert [row["answer"] for row in rows] == [row["answer"] for row in plain]
    # the rows that are drawn with the seed of those that are shown
    train = given.rows("train", 4, 1234)
    assert [row["prompt"] for row in train] == [ahead + row["prompt"] for row in TASK.rows("train", 6, 1234)[2:]]
    check_prompt(rows[0], demo_tokenizer, "demo")


def test_a_chat_shows_solved_problems_as_messages_behind_the_system_text(chat_tokenizer):
    task = Echo(ROWS, SHOWN).task
    given, chat = shaped(task, chat_tokenizer, Shape(system="Be short.", shots=1))
    (row,) = given.rows("test", 2, 0)[1:]
    assert chat and row["prompt"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "0 + 1"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "1 + 1"},
    ]
    assert given.rows("train", 9, 0)[0]["answer"] == "2" and len(given.rows("train", 9, 0)) == 4


def test_solved_problems_stand_ahead_of_a_dialogue_and_behind_the_tasks_system_message(chat_tokenizer):
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    rows = [{"prompt": [*turns[:-1], {"role": "user", "content": str(i)}], "answer": "yes"} for i in range(2)]
    (row,) = shaped(Echo(rows, SHOWN).task, chat_tokenizer, Shape(shots=1))[0].rows("train", 1, 0)
    said = [message["content"] for message in row["prompt"]]
    assert said == ["system", "0", "yes", "user", "assistant", "1"]


def test_a_system_text_begins_a_plain_prompt(demo_tokenizer):
    (row,) = shaped(Echo(ROWS).task, demo_tokenizer, Shape(system="Be short."))[0].rows("test", 1, 0)
    assert row["prompt"] == "Be short.\n\n0 + 1"
    (row,) = shaped(Echo(ROWS, SHOWN).task, demo_tokenizer, Shape(system="Be short.", shots=1))[0].rows("test", 1, 0)
    assert row["prompt"] == "Be short.\n\nQ: 0 + 1\nA: 1\n\nQ: 0 + 1\nA:"


@pytest.mark.parametrize("system", [None, ""])
def test_no_system_text_is_none(chat_tokenizer, system):
    (row,) = shaped(Echo(ROWS).task, chat_tokenizer, Shape(system=system))[0].rows("test", 1, 0)
    assert row["prompt"] == [{"role": "user", "content": "0 + 1"}]


OWN = [{"prompt": [{"role": "system", "content": "You play."}, {"role": "user", "content": "Go"}]}]


@pytest.mark.parametrize("chat", [None, True, False])
def test_a_system_text_goes_ahead_of_the_tasks_own(chat_tokenizer, chat):
    given, _ = shaped(Echo(OWN).task, with_template(chat_tokenizer, ROLES), Shape(chat, system="Be short."))
    system, user = given.rows("test", 1, 0)[0]["prompt"]
    assert system == {"role": "system", "content": "Be short.\n\nYou play."} and user["content"] == "Go"
    assert OWN[0]["prompt"][0]["content"] == "You play."


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refuses", "drops"])
def test_where_the_template_takes_no_system_message_the_user_says_it(chat_tokenizer, template):
    tokenizer = with_template(chat_tokenizer, template)
    (row,) = shaped(Echo(ROWS, SHOWN).task, tokenizer, Shape(system="Be short.", shots=1))[0].rows("test", 1, 0)
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][0]["content"] == "Be short.\n\n0 + 1" and row["prompt"][2]["content"] == "0 + 1"
    (row,) = shaped(Echo(OWN).task, tokenizer, Shape())[0].rows("test", 1, 0)  # the task's own system message
    assert row["prompt"] == [{"role": "user", "content": "You play.\n\nGo"}]


def test_a_plain_completion_is_graded_up_to_the_next_problem_that_it_makes_up(demo_tokenizer):
    echo = Echo(ROWS, SHOWN)
    given, _ = shaped(echo.task, demo_tokenizer, Shape(shots=2))
    completions = [" 3\n\nQ: 7 + 1\nA: 8", " 3", "\n3\n", ""]
    given.reward(prompts=[""] * 4, completions=completions, answer=["3"] * 4)
    assert echo.seen == [" 3\n", " 3", "\n3\n", ""]
    assert [given.answer(text) for text in completions] == ["3", "3", "3", ""]
    assert shaped(echo.task, demo_tokenizer, Shape())[0].reward == echo.reward  # nothing shown, nothing cut


def test_a_solution_that_holds_the_end_itself_leaves_completions_whole(demo_tokenizer):
    echo = Echo([{"prompt": "0 + 1", "answer": "1\nQ: why"}, *ROWS], SHOWN)
    given, _ = shaped(echo.task, demo_tokenizer, Shape(shots=1))
    given.reward(prompts=[""], completions=["2\nQ: x"], answer=[""])
    assert echo.seen == ["2\nQ: x"]


def test_the_think_that_a_template_writes_is_part_of_the_completion(chat_tokenizer):
    tokenizer, echo = with_template(chat_tokenizer, THINKS), Echo(ROWS)
    given, _ = shaped(echo.task, tokenizer, Shape())
    message = {"role": "assistant", "content": "It is 5"}
    parsed = {**message, "reasoning_content": "5?"}
    for completion in (message, parsed, {**message, "content": "<think>5"}):
        given.reward(prompts=[[]], completions=[[completion]])
    assert [seen[-1]["content"] for seen in echo.seen] == ["<think>It is 5", "It is 5", "<think>5"]
    assert given.answer("It is 5") == "<think>It is 5"
    for quiet in (Shape(template_kwargs={"quiet": True}), Shape(chat=False)):
        assert shaped(echo.task, tokenizer, quiet)[0].reward == echo.reward


def test_a_template_that_needs_a_system_message_gets_it_and_its_think_counts(chat_tokenizer):
    tokenizer = with_template(chat_tokenizer, NEEDS_SYSTEM)
    given, _ = shaped(Echo(ROWS).task, tokenizer, Shape(system="1 + 1"))
    (row,) = given.rows("test", 1, 0)
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert given.answer("It is 5") == "<think>It is 5"


@pytest.mark.parametrize(
    ("task", "shots", "message"),
    [
        (Echo(ROWS, SHOWN).task, 6, "--shots 6 asks for more than the 5 train problems of echo"),
        (Echo(ROWS, SHOWN).task, -1, "--shots must be at least 0, got -1"),
        (Echo(ROWS).task, 1, "task echo has no solutions that --shots could show"),
        (Echo(OWN, SHOWN, environment_factory=dict).task, 1, "plays through an environment, which --shots cannot show"),
    ],
)
def test_problems_that_cannot_be_shown_are_refused(demo_tokenizer, task, shots, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        shaped(task, demo_tokenizer, Shape(shots=shots))
    assert "\n" not in str(raised.value)


def test_where_all_problems_are_shown_none_is_left_to_train_on(demo_tokenizer):
    given, _ = shaped(Echo(ROWS, SHOWN, train_size=5).task, demo_tokenizer, Shape(shots=5))
    assert given.train_size == 0
    with pytest.raises(ValueError, match="--shots 5 shows all train problems of echo; show fewer"):
        given.rows("train", 3, 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the task's prompts are chat messages, and the tokenizer of m has no chat template"),
        (NEEDS_TOOLS, "the chat template of m cannot write the task's prompts: it needs tools, and the task has none"),
        (
            NEEDS_SYSTEM,
            "the task's prompts: it needs a system message (no system message); give one with --system TEXT; --plain",
        ),
        ("{{ raise_exception('roles must\\nalternate') }}", "cannot write the task's prompts: roles must alternate"),
    ],
)
def test_a_chat_template_that_cannot_write_the_prompts_is_named(tokenizer, template, message):
    row = {"prompt": [{"role": "user", "content": "abc"}]}
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check_prompt(row, with_template(tokenizer, template), "m")
    assert "\n" not in str(raised.value)
    if template == NEEDS_TOOLS:
        check_prompt(row, tokenizer, "m", plays=True)
