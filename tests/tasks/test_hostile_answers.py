"""No answer keeps a reward busy: 200 hostile ones for every data set, gsm8k, and a task of a user."""

import hostile
import pytest
from reasoning_gym.factory import DATASETS

from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.gsm8k import gsm8k_reward
from peft_onelayer.tasks.reasoning_gym import reasoning_gym_reward


def test_there_are_200():
    assert 195 <= len(set(hostile.of("1 2 3"))) <= len(hostile.of("1 2 3")) <= 200


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"composite"}))
def test_no_answer_keeps_a_data_set_busy(name):
    row = load_task(f"reasoning_gym:{name}").rows("train", 1, seed=0)[0]
    answers = hostile.of(str(row["answer"]))
    log = []
    columns = {key: [row[key]] * len(answers) for key in ("dataset", "entry")}
    rewards = reasoning_gym_reward(
        [""] * len(answers),
        [f"<answer>{answer}</answer>" for answer in answers],
        **columns,
        log_metric=lambda _, count: log.append(count),
    )
    assert all(0 <= reward <= 1 for reward in rewards)
    print(f"{name}: {log[0]:.0f} over the limit")
    paid = {answer for answer, reward in zip(answers, rewards, strict=True) if reward > 0.95} & set(hostile.FIXED)
    if name != "propositional_logic":  # where many a conclusion is right
        assert not [answer for answer in paid if len(answer) > 6], paid  # what is right here: "1e-400" for 0


@pytest.mark.more
def test_no_answer_keeps_gsm8k_busy():
    answers = hostile.of("18")
    for form in ("{}", r"\boxed{{{}}}", "<answer>{}</answer>", "#### {}", "The answer is {}."):
        completions = [form.format(answer) for answer in answers]
        rewards = gsm8k_reward([""] * len(answers), completions, answer=["#### 18"] * len(answers))
        assert set(rewards) == {0.0}


TASK = """
import ast, json, math
REWARD_SECONDS = 0.2
def rows(split, n, seed): return [{"prompt": "Compute 9 * 2."}] * n
def reward(prompts, completions, **kwargs):
    try:
        return [float(eval(completions[0], {"__builtins__": {}}, vars(math)) == 18)]
    except Exception:
        return [0.0]
"""


@pytest.mark.more
def test_no_answer_keeps_a_users_task_busy(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    task, log = load_task(str(tmp_path / "task.py")), []
    answers = hostile.of("18")
    rewards = task.reward(
        prompts=["p"] * len(answers), completions=answers, log_metric=lambda _, count: log.append(count)
    )
    assert set(rewards) == {0.0} and log[0] >= 3
    assert task.reward(prompts=["p"], completions=["9 * 2"]) == [1.0]
