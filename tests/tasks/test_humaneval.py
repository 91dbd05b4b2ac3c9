import contextlib
import gzip
import itertools
import json
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_sets import FULL, full, own

from peft_onelayer import sandbox
from peft_onelayer.tasks import limits, load_task
from peft_onelayer.tasks.humaneval import INSTRUCTION, humaneval_reward, readings

pytestmark = pytest.mark.skipif(bool(sandbox.available()), reason=str(sandbox.available()))

STUB = '''\
import math
from typing import List

SCALE = 2


def scaled(x: float) -> float:
    """Helper."""
    return SCALE * x


def roots(xs: List[float]) -> List[float]:
    """Square roots, scaled, of those that have one.
    >>> roots([4, -1])
    [4.0]
    """
'''
BODY = """\
    result = []
    for x in xs:
        if x >= 0:
            result.append(scaled(math.sqrt(x)))

    # done
    return result
"""
PROGRAM = "def roots(xs: List[float]) -> List[float]:\n" + BODY
TEST = """
METADATA = {'author': 'x'}

def check(candidate):
    assert candidate([4, -1, 9]) == [4.0, 6.0]
    assert candidate([]) == []
    assert roots([1]) == [scaled(1)]
"""
FENCED = f"```python\n{PROGRAM}```\n"
DEDENTED = textwrap.dedent(BODY)


def grade(*completions, prompt=STUB, test=TEST, entry_point="roots", **kwargs):
    n = len(completions)
    return humaneval_reward([prompt] * n, list(completions), test=[test] * n, entry_point=[entry_point] * n, **kwargs)


RIGHT = {
    "body": BODY,
    "body without its end": BODY.rstrip(),
    "body with a blank line before": "\n" + BODY,
    "body in other indentation": textwrap.indent(DEDENTED, "  "),
    "body that lost its first indentation": BODY.lstrip(),
    "body that lost a part of its first indentation": BODY[1:],
    "body that lost its indentation": DEDENTED,
    "body with tabs": textwrap.indent(DEDENTED.replace("    ", "\t"), "\t"),
    "body and a second function": BODY + "\n\ndef other(x):\n    return roots(\n",
    "body and a main part": BODY + '\n\nif __name__ == "__main__":\n    print(roots([int(input())]))\n',
    "body and its function once more": BODY + "\n\n" + PROGRAM.replace("sqrt", "exp"),
    "body and a comment": BODY + "# Test it:\nprint(roots(\n",
    "body with a comment in the first column": BODY.replace("    # done", "# done"),
    "body with a string in the first column": '    """\nNo docstring.\n"""\n' + BODY,
    "dedented body and a second function": DEDENTED + "\ndef other(x):\n    return (\n",
    "body in a fence": f"```python\n{BODY}```",
    "dedented body in a fence": f"Here it is:\n\n```\n{DEDENTED}```\nDone.",
    "body and a closing fence": BODY + "```\n\nThis loops over the numbers.",
    "program": PROGRAM,
    "program after a space": " " + PROGRAM,
    "program in a fence": FENCED,
    "program in a fence with DOS lines": FENCED.replace("\n", "\r\n"),
    "program in a fence without language": FENCED.replace("python", ""),
    "program in a tilde fence": FENCED.replace("```", "~~~"),
    "program in an unclosed fence": "Sure!\n" + FENCED.removesuffix("```\n"),
    "program in a fence in a list": "1. So:\n\n" + textwrap.indent(FENCED, "   "),
    "program in a fence between prose": f"I'd filter first.\n\n{FENCED}\nIt's linear; don't use a loop.",
    "draft, program, example": f"{FENCED.replace('sqrt', 'exp')}No:\n{FENCED}Use:\n```\nroots([4])\n```",
    "thoughts, then a program": f"<think>\n```python\ndef roots(xs):\n    return xs\n```\nwrong\n</think>\n{FENCED}",
    "program between prose": f"Here's the function:\n\n{PROGRAM}\nIt's linear; I didn't use\na list comprehension.\n",
    "program and what was cut": PROGRAM + "\n\nassert roots([4]) == [4.0]\n\ndef test_roots():\n    assert roots([",
    "program with its own imports": "import math\nfrom typing import List, Dict\n\n" + PROGRAM,
    "program with a future import": "from __future__ import annotations\nimport math\n"
    + PROGRAM.replace("scaled(", "(2 * "),
    "program with a helper below": PROGRAM.replace("scaled(", "twice(") + "\n\ndef twice(x):\n    return 2 * x\n",
    "whole prompt and body": STUB + BODY,
    "async helper, decorator": "import functools\n\n@functools.cache\ndef one():\n    return 1\n\n" + PROGRAM,
    "chat": [{"role": "assistant", "content": FENCED}],
}
ROOT = "def root(x):\n    return math.sqrt(x)\n"
AROUND = {  # a right program, and what chat models put around it
    "its import in a fence of its own": f"First:\n```python\nimport math\n```\nThen:\n```python\n{ROOT}```",
    "a helper in a fence of its own": "```python\nfrom math import sqrt as s\n\ndef h(x):\n    return s(x)\n```\n\n"
    "```python\ndef root(x):\n    return h(x)\n```",
    "an example that asks": f"```python\nimport math\n{ROOT}\nx = int(input())\nprint(root(x))\n```",
    "an example that is wrong": f"import math\n\n{ROOT}\nassert root(4) == 3\n",
    "tests below": f"import math\n\n{ROOT}\ndef test():\n    assert root(4) == 3\n\ntest()\n",
    "a main part": f"import math\n{ROOT}\nif __name__ in ('__main__', 'builtins'):\n    raise SystemExit(1)\n",
    "a constant above": "Here you go:\n\nPOWER = 0.5\n\ndef root(x):\n    return x ** POWER\n",
    "a constant below": "def root(x):\n    return x ** POWER\n\nPOWER = 0.5\nprint(root(-1) > 3)\n",
    "a class": "```python\nclass Solution:\n    def root(self, x):\n        return x ** 0.5\n```",
    "a class with prose": "Use a class:\n\nimport math\n\nclass A:\n    @staticmethod\n    def root(x):\n"
    "        return math.sqrt(x)\n\nIt works.\n",
    "a lambda": "```python\nroot = lambda x: x ** 0.5\n```",
    "marks of another model": f"[PYTHON]\nimport math\n{ROOT}[/PYTHON]\n[TESTS]\nassert root(4) == 3\n[/TESTS]",
    "a fence in its docstring": '```python\nimport math\ndef root(x):\n    """Root.\n\n    ```\n    root(4)\n    ```\n'
    '    """\n    return math.sqrt(x)\n```\nDone.',
    "a fence that closes behind its last word": f"```python3\nimport math\n{ROOT.rstrip()}```\nDone.",
}
WRONG = {
    "nothing": "",
    "blank": "\n  \n",
    "an empty fence": "```python\n```",
    "prose": "I cannot do that.",
    "pass": "    pass\n",
    "another result": BODY.replace("sqrt", "exp"),
    "another function": FENCED.replace("def roots", "def square_roots"),
    "cut short": BODY[:-12],
    "cut in the program": f"```python\n{PROGRAM[:-12]}",
    "the prompt again": STUB,
    "right in the draft only": FENCED + FENCED.replace("sqrt", "exp"),
    "not a function": "roots = 3\n",
    "a class": "class Solution:\n" + textwrap.indent(PROGRAM, "    "),
    "chat": [{"role": "assistant", "content": "Sure."}],
}


def compiled(completion, function="root"):
    for program in readings(completion, "", function):
        with contextlib.suppress(SyntaxError):
            return compile(program, "program", "exec")
    return None


@pytest.mark.parametrize("form", AROUND)
def test_what_chat_models_put_around_a_program_does_not_hinder_it(form):
    names = {}
    exec(compiled(AROUND[form]), names)
    assert names["root"](16) == 4


def test_what_is_no_example_stays():
    text = "def root(x):\n    return LIMITS[x]\n\nimport math\nLIMITS = {}\nLIMITS[1] = 2\n\ndef b(): pass\n"
    assert next(readings(text, "", "root")) == f"\n{text}"
    assert "while" not in next(readings(f"{ROOT}\nwhile True:\n    pass\n", "", "root"))
    both = "```python\ndef root(x):\n    return 1\n```\n```python\ndef root(x):\n    return 2\n```"
    assert next(readings(both, "", "root")) == "\ndef root(x):\n    return 2\n"  # the draft does not go ahead of it
    print_first = "print('x')\ndef root(x):\n    return 1\n"
    assert next(readings(print_first, "", "root")) == f"\n{print_first}"


NEEDED = {  # what stands around a right program and is no example of its use
    "a limit": """
def root(x):
    return root(x - 1) + 1e-4 if x > 16 else 4

import sys
sys.setrecursionlimit(10**4)
""",
    "a limit on one line": """
def root(x):
    return sqrt(x)
import sys; sys.setrecursionlimit(10**4); from math import sqrt
""",
    "an import beside an example": """
def root(x):
    return math.sqrt(x)
import math; print(root(16))
""",
    "an attribute of a class": """
class P:
    pass
def root(x):
    return x ** P.k
P.k = 0.5
""",
    "an attribute of the function": """
def root(x):
    return x ** root.k
root.k = 0.5
print(root(1 / 0))
""",
    "what a table is made of": """
def root(x):
    return TABLE[x]
n = 17
TABLE = [i**0.5 for i in range(n)]
""",
    "a table that a function fills": """
def root(x):
    return T[x]
def fill():
    global T
    T = {16: 4}
fill()
""",
    "a default": """
def root(x):
    return power(x)
half = 0.5
def power(x, k=half):
    return x**k
""",
    "a table in a loop": """
T = {}
def root(x):
    return T[x]
for i in range(17):
    T[i] = i**0.5
root(1 / 0)
""",
    "a table beside a loop that asks": """
def root(x):
    return T[x]
T = [i**0.5 for i in range(17)]
for i in range(int(input())):
    print(root(i))
""",
    "a method taken from its class": """
def root(x):
    return 0
class S:
    def f(self, x):
        return x**0.5
s = S()
root = s.f
""",
}
TESTS_A_LIBRARY = """
import unittest
class T(unittest.TestCase):
    def test(self):
        assert root(4) == 3
unittest.main()
"""
EXAMPLES = {  # below a right program
    "a test library": TESTS_A_LIBRARY,
    "an end": "import sys\ndef main():\n    print(root(4))\n    return 1\nsys.exit(main())",
    "a question": "def ask():\n    return int(input())\nx = ask()\nprint(root(x))",
    "lines of input": "import sys\nn = int(sys.stdin.readline())\nfor i in range(n):\n    print(root(i))",
    "tests of a helper": "def test():\n    assert 1 == 2\ntest()",
    "a result": "found = root(1 / 0)",
    "a main part": "import sys\nif __name__ in ('__main__', 'builtins'):\n    sys.setrecursionlimit(1 / 0)",
    "a run with input of its own": "import sys\nsys.stdin = open('no such file')\nprint(root(1 / 0))",
}


@pytest.mark.parametrize("form", NEEDED)
def test_what_a_program_needs_from_below_it_stays(form):
    names = {}
    before = sys.getrecursionlimit()
    exec(compiled(NEEDED[form]), names)
    assert (sys.getrecursionlimit() == 10**4) == ("limit" in form)
    sys.setrecursionlimit(before)
    assert names["root"](16) == 4


@pytest.mark.parametrize("form", EXAMPLES)
def test_examples_below_a_program_are_left_out(form):
    names = {}
    exec(compiled(f"def root(x):\n    return x**0.5\n\n{EXAMPLES[form]}\n"), names)
    assert names["root"](16) == 4


@pytest.mark.more
def test_forms_of_a_right_completion():
    rewards = grade(*RIGHT.values())
    assert dict(zip(RIGHT, rewards, strict=True)) == dict.fromkeys(RIGHT, 1.0)


def test_wrong_completions():
    rewards = grade(*WRONG.values())
    assert dict(zip(WRONG, rewards, strict=True)) == dict.fromkeys(WRONG, 0.0)


def test_forms_of_the_prompt():
    fenced = f"Complete this function:\n\n```python\n{STUB}```\nAnswer with code."
    chat = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": INSTRUCTION + STUB}]
    for prompt in (
        STUB.rstrip(),
        INSTRUCTION + STUB,
        f"Please complete:\n{STUB.removeprefix('import math')}",
        fenced,
        chat,
    ):
        # without a docstring too: the head alone is no complete statement
        assert grade(BODY.replace("math.sqrt(x)", "x ** .5"), prompt=prompt) == [1.0], prompt
    assert grade(BODY, prompt=STUB.partition('    """Square')[0]) == [1.0]
    # a data set's own column, as TRL never passes it but a user may
    assert grade(BODY, prompt="?") == [0.0]
    assert humaneval_reward(
        ["?"], [BODY], [TEST], ["roots"], prompt=[STUB], task_id=["x"], canonical_solution=[""]
    ) == [1.0]


def test_what_trl_passes_beside_the_columns_is_ignored():
    rewards = humaneval_reward(
        prompts=[STUB, STUB],
        completions=[BODY, WRONG["pass"]],
        completion_ids=[[1], [2]],
        test=[TEST] * 2,
        entry_point=["roots"] * 2,
        task_id=["a", "b"],
        trainer_state=None,
        log_extra=print,
        log_metric=print,
    )
    assert rewards == [1.0, 0.0]


def test_programs_read_by_several_threads_leave_the_processs_warnings_as_they_were():
    before, interval = list(warnings.filters), sys.getswitchinterval()
    program = "def f(x):\n    return '\\d'\n" + "".join(f"y{i} = {i}\n" for i in range(40))
    sys.setswitchinterval(1e-5)
    try:
        with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(4) as pool:
            warnings.simplefilter("always")
            set_to = list(warnings.filters)
            list(pool.map(lambda _: list(readings(program, "", "f")), range(60)))
            after = list(warnings.filters)
    finally:
        sys.setswitchinterval(interval)
        warnings.filters[:] = before
    assert after == set_to and not told


def test_the_program_that_does_not_compile_at_its_end_is_cut_at_its_top_level_only():
    assert list(readings("def f(x):\n    return (\n\nx = 1\ny = 2", "", "f")) == [
        "\ndef f(x):\n    return (\n\nx = 1\ny = 2",
        "\ndef f(x):\n    return (\n\nx = 1\n",
        "\ndef f(x):\n    return (\n\n",
    ]


# --- whole data sets ---


@pytest.fixture(scope="module", params=[own("humaneval.jsonl"), full("HumanEval.jsonl.gz")])
def path(request):
    return request.param


@pytest.fixture(scope="module")
def problems(path):
    found = load_task(f"humaneval:{path}").rows("test", 1000, seed=0)
    assert len({row["task_id"] for row in found}) == len(found) == (164 if path.parent == FULL else 10)
    return found


def grade_all(problems, completions):
    columns = {name: [row[name] for row in problems] for name in problems[0]}
    prompts = [[{"role": "user", "content": prompt}] for prompt in columns.pop("prompt")]
    rewards = humaneval_reward(prompts=prompts, completions=completions, **columns)
    return {row["task_id"]: reward for row, reward in zip(problems, rewards, strict=True)}


def test_all_canonical_bodies_pass(problems):
    rewards = grade_all(problems, [row["canonical_solution"] for row in problems])
    assert {name for name, reward in rewards.items() if reward != 1.0} == set()


FORMS = {
    "program in a fence": lambda prompt, body: f"```python\n{prompt}{body}\n```",
    "program between prose": lambda prompt, body: f"Here's how:\n\n{prompt}{body}\n\nI hope it's clear.",
    "without imports and helpers": lambda prompt, body: f"```python\n{prompt[prompt.rindex('def ') :]}{body}",
    "body in a fence": lambda prompt, body: f"```\n{body}\n```\n",
    "dedented body": lambda prompt, body: textwrap.dedent(body),
    "body that lost its first indentation": lambda prompt, body: body.lstrip(),
    "body and what was cut": lambda prompt, body: body.rstrip() + "\n\n\ndef main():\n    print(",
}


@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.more) for i in range(1, len(FORMS)))])
def test_all_canonical_solutions_pass_in_other_forms(problems, first):
    """In one form each, the next problem in the next form; with every `first` all of them in all forms."""
    forms = itertools.islice(itertools.cycle(FORMS.values()), first, None)
    written = [form(row["prompt"], row["canonical_solution"]) for form, row in zip(forms, problems, strict=False)]
    assert {name for name, reward in grade_all(problems, written).items() if reward != 1.0} == set()


BROKEN = [
    "    return None\n",
    "    return [[[]]]\n",
    "    raise AssertionError\n",
    "    raise SystemExit\n",
    "    import sys; sys.exit(0)\n",
    "    import os; os._exit(0)\n",
    """\
    class Equal(int):
        def __eq__(self, other):
            return True
    return Equal()
""",
    """\
    import os
    for fd in range(256):
        try:
            os.write(fd, b'{"passed": true}\\n')
        except OSError:
            pass
""",
]


def test_all_broken_solutions_fail(problems):
    rewards = grade_all(problems, [BROKEN[i % len(BROKEN)] for i in range(len(problems))])
    assert {name for name, reward in rewards.items() if reward != 0.0} == set()


def test_rows_have_the_data_sets_columns(path, problems):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        originals = {row["task_id"]: row for row in map(json.loads, file)}
    for row in problems:
        assert row == originals[row["task_id"]] | {"prompt": INSTRUCTION + originals[row["task_id"]]["prompt"]}


# --- loading ---


@pytest.fixture
def write(tmp_path):
    def write(name, n=40, **changes):
        row = {
            "task_id": "x",
            "prompt": STUB,
            "canonical_solution": BODY,
            "test": TEST,
            "entry_point": "roots",
        } | changes
        rows = [row | {"task_id": f"{name}/{i}", "prompt": f"N = {i}\n{row['prompt']}"} for i in range(n)]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.more
def test_all_of_a_file_is_for_evaluation(write):
    task = load_task(f"humaneval:{write('mine.jsonl')}")
    rows = task.rows("test", 100, 0)
    assert len({row["task_id"] for row in rows}) == 40
    assert task.rows("test", 7, 0) == rows[:7] and task.rows("test", 7, 1) != rows[:7]
    assert task.reward.__name__ == "humaneval_reward" and task.data["mine.jsonl"].startswith("sha256:")
    columns = {name: [row[name] for row in rows[:2]] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row in rows[:2]]
    assert task.reward(prompts=prompts, completions=[BODY, "    pass"], **columns) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"for evaluation only; .* give humaneval:FOLDER with a train.jsonl"):
        task.rows("train", 1, 0)


@pytest.mark.more
def test_a_folder_may_hold_problems_to_train_on(write, tmp_path):
    write("train.jsonl")
    write("test.jsonl", n=3, prompt="# other\n" + STUB)
    task = load_task(f"humaneval:{tmp_path}")
    assert len(task.rows("train", 100, 0)) == 40 and len(task.rows("test", 100, 0)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": "def check(candidate):\n    assert candidate("}, "the tests of 'roots' are not Python"),
        ({"test": "assert roots([]) == []"}, r"the tests of 'roots' define no check\(candidate\)"),
    ],
)
def test_bad_data_is_refused_when_loaded(write, changes, message):
    with pytest.raises(ValueError, match=message):
        load_task(f"humaneval:{write('bad.jsonl', **changes)}")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"test": "def check(candidate):\n    assert candidate([4.0]) == [3.0]"}, "AssertionError"),
        ({"test": "def check(candidate):\n    import no_such_package"}, "no_such_package"),
        ({"entry_point": "other"}, "other"),
        ({"canonical_solution": "    return oops"}, "oops"),
    ],
)
def test_a_harness_that_cannot_judge_is_refused_by_its_row(write, changes, why):
    good = write("mine.jsonl", n=4).read_text()
    bad = write("mine.jsonl", n=1, **changes).read_text().replace("mine.jsonl/0", "mine.jsonl/bad")
    path = write("mine.jsonl", n=0)
    path.write_text(good + bad)
    with pytest.raises(ValueError, match=r"the canonical solution of mine.jsonl/bad does not pass") as raised:
        load_task(f"humaneval:{path}")
    assert why in str(raised.value) and "\n" not in str(raised.value)


def test_without_a_canonical_solution_nothing_is_run(write, monkeypatch):
    path = write("mine.jsonl", n=3, canonical_solution=None)
    monkeypatch.setattr(sandbox, "run", None)
    assert len(load_task(f"humaneval:{path}").rows("test", 9, 0)) == 3


def test_missing_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        load_task(f"humaneval:{tmp_path}/none.jsonl")


def test_without_a_sandbox_loading_is_refused_unless_unsafe(write, monkeypatch):
    name = f"humaneval:{write('mine.jsonl')}"
    monkeypatch.setattr(sandbox, "available", lambda: "no sandbox can be made here")
    with pytest.raises(sandbox.SandboxError, match=r"no sandbox can be made here.*--unsafe"):
        load_task(name)
    with pytest.raises(sandbox.SandboxError, match="--unsafe"):
        grade(BODY)
    with pytest.warns(UserWarning, match="runs without a sandbox"):
        task = load_task(name, unsafe=True)
    with pytest.warns(UserWarning, match="runs without a sandbox"):
        assert task.reward([STUB] * 2, [BODY, "    pass"], [TEST] * 2, ["roots"] * 2) == [1.0, 0.0]


@pytest.mark.more
def test_programs_past_the_time_limit_score_0_and_are_counted(monkeypatch):
    """And a text of a million characters is not even read."""
    run = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *args, **kwargs: run(*args, **kwargs, timeout=2, cpu_seconds=1))
    prompt, test = "def double(x):\n", "def check(candidate):\n    assert candidate(4) == 8"
    loops = "    while True: pass", "    import time; time.sleep(60)"
    completions = ["    return 2 * x", *loops, "    return 1", "    return 2 * x\n" + "# \n" * 300_000, "(" * 1_000_000]
    log, n = [], len(completions)
    rewards = humaneval_reward(
        [prompt] * n, completions, [test] * n, ["double"] * n, log_metric=lambda *args: log.append(args)
    )
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert log == [(limits.OVER_LIMIT, 2.0)]
