"""`gigpo_advantages` against the formulas of arXiv 2505.10978, written down once more step by step."""

import difflib
import doctest
import math
import random
import statistics

import pytest

from peft_onelayer.rl import advantages, gigpo_advantages


def reference(rewards, anchors, groups, gamma, omega, normalize, together):
    """Every step searches all steps of its task for those that belong `together`. Quadratic and literal."""

    def relative(value, others):
        if len(others) == 1:
            return 0.0
        scale = statistics.stdev(others) + 1e-6 if normalize == "std" else 1.0
        return (value - statistics.mean(others)) / scale

    def to_go(i, t):
        return sum(gamma ** (k - t) * rewards[i][k] for k in range(t, len(rewards[i])))

    result = []
    for i in range(len(rewards)):
        peers = [j for j in range(len(rewards)) if groups[j] == groups[i]]
        episode = relative(sum(rewards[i]), [sum(rewards[j]) for j in peers])
        row = []
        for t in range(len(rewards[i])):
            places = [(j, s) for j in peers for s in range(len(rewards[j])) if together(i, t, j, s)]
            row.append(episode + omega * relative(to_go(i, t), [to_go(j, s) for j, s in places]))
        result.append(row)
    return result


def trajectories(rng):
    """Few states, so that some repeat within a trajectory and some stand alone; tasks mixed."""
    count = rng.randint(1, 12)
    groups = [rng.choice(["a", "b", 3]) for _ in range(count)]
    lengths = [rng.randint(1, 9) for _ in range(count)]
    rewards = [[rng.choice([0.0, 0.0, 1.0, -0.5, rng.gauss(0, 3)]) for _ in range(n)] for n in lengths]
    anchors = [[rng.choice("uvwxyz" if rng.random() < 0.9 else "123456789") for _ in range(n)] for n in lengths]
    return rewards, anchors, groups


def assert_close(found, expected):
    assert [len(row) for row in found] == [len(row) for row in expected]
    pairs = [(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    assert all(isinstance(a, float) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("normalize", ["std", "none"])
@pytest.mark.parametrize(("gamma", "omega"), [(0.95, 1.0), (0.0, 1.0), (1.0, 0.5), (0.5, 0.0)])
def test_random_trajectories(normalize, gamma, omega):
    rng = random.Random(f"{normalize} {gamma} {omega}")
    seen = {"alone": 0, "within": 0, "across": 0}
    for _ in range(100):
        rewards, anchors, groups = trajectories(rng)
        found = gigpo_advantages(rewards, anchors, groups, gamma, omega, normalize)
        same = lambda i, t, j, s: anchors[i][t] == anchors[j][s]  # noqa: E731, B023
        assert_close(found, reference(rewards, anchors, groups, gamma, omega, normalize, same))
        for i, row in enumerate(anchors):
            others = [state for j, other in enumerate(anchors) if j != i and groups[j] == groups[i] for state in other]
            seen["alone"] += sum(row.count(state) == 1 and state not in others for state in row)
            seen["within"] += sum(row.count(state) > 1 and state not in others for state in row)
            seen["across"] += sum(state in others for state in row)
    assert min(seen.values()) > 50  # each kind of group was met


def test_the_defaults_are_the_papers():
    data = trajectories(random.Random(0))
    assert gigpo_advantages(*data) == gigpo_advantages(*data, gamma=0.95, omega=1.0, normalize="std", similarity=None)


@pytest.mark.parametrize("threshold", [0.6, 0.8, 1.0])
def test_similar_states(threshold):
    rng = random.Random(threshold)
    words = ["you", "are", "in", "the", "kitchen", "hall", "with", "an", "open", "closed", "door", "key", "on", "table"]
    merged = 0
    for _ in range(20):
        rewards, _, groups = trajectories(rng)
        anchors = [[" ".join(rng.choices(words, k=rng.randint(2, 4))) for _ in row] for row in rewards]

        ratio = lambda a, b: difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()  # noqa: E731

        # Each state in order goes to the first representative that it resembles.
        representative, chosen = {}, {}
        for i, row in enumerate(anchors):
            for t, state in enumerate(row):
                known = representative.setdefault(groups[i], [])
                alike = [k for k in known if ratio(k, state) >= threshold]
                if not alike:
                    known.append(state)
                chosen[i, t] = (groups[i], alike[0] if alike else state)
                merged += bool(alike) and alike[0] != state

        same = lambda i, t, j, s: chosen[i, t] == chosen[j, s]  # noqa: E731, B023
        expected = reference(rewards, anchors, groups, 0.9, 1.0, "std", same)
        assert_close(gigpo_advantages(rewards, anchors, groups, 0.9, similarity=threshold), expected)
    assert (merged == 0) == (threshold == 1.0)


def test_long_similar_texts_belong_together():
    """difflib's heuristic would drop every letter of these, and find a ratio near 0."""
    room = "the tea is at the east seat in this area. " * 10
    anchors = [["one door is here. " + room], ["two doors are here. " + room]]
    assert difflib.SequenceMatcher(None, anchors[0][0], anchors[1][0]).ratio() < 0.1
    assert advantages.anchor_groups(anchors, [0, 0], 0.95) == [[0], [0]]
    assert advantages.anchor_groups(anchors, [0, 0]) == [[0], [1]]
    assert advantages.anchor_groups(anchors, [0, 1], 0.95) == [[0], [1]]


def test_what_stands_alone_gets_zero():
    assert gigpo_advantages([[3.0, 1.0]], [["u", "v"]], [0]) == [[0.0, 0.0]]
    assert gigpo_advantages([], [], []) == []


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, -7.7])
def test_equal_returns_give_exactly_zero(value):
    assert gigpo_advantages([[value]] * 7, [["u"]] * 7, [0] * 7) == [[0.0]] * 7


def test_anchors_are_any_hashables():
    assert gigpo_advantages([[1], [0]], [[(0, 1)], [(0, 1)]], [0, 0], normalize="none") == [[1.0], [-1.0]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1]], [["u"]], [0, 0]), {}, "one entry per trajectory, got 1, 1 and 2"),
        (([[1], [1, 2]], [["u"], ["u"]], [0, 0]), {}, "trajectory 1 has 2 rewards and 1 anchors"),
        (([[1], []], [["u"], []], [0, 0]), {}, "trajectory 1 has 0 rewards and 0 anchors, expected .* at least one"),
        (([[1, math.nan]], [["u", "v"]], [0]), {}, "reward of step 1 of trajectory 0 is nan, expected a finite"),
        (([[math.inf]], [["u"]], [0]), {}, "reward of step 0 of trajectory 0 is inf"),
        (([[1]], [["u"]], [0]), {"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        (([[1]], [["u"]], [0]), {"gamma": math.nan}, "gamma must be"),
        (([[1]], [["u"]], [0]), {"omega": math.inf}, "omega must be a finite number, got inf"),
        (([[1]], [["u"]], [0]), {"normalize": "batch"}, "normalize must be one of std, none, got 'batch'"),
        (([[1]], [["u"]], [0]), {"similarity": 0}, r"similarity must be None .* in \(0, 1\], got 0"),
        (([[1]], [[5]], [0]), {"similarity": 0.9}, "similarity compares strings, got an anchor of type int"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        gigpo_advantages(*arguments, **options)


def test_the_examples_run():
    results = doctest.testmod(advantages)
    assert results.attempted > 0 and results.failed == 0
