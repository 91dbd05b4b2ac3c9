"""PEFT's own tests: one clear line when they cannot be had, and a summary for each family of models."""

from collections import Counter, defaultdict

import pytest

from .source import fetch


def problem() -> str | None:
    try:
        fetch()
    except RuntimeError as error:
        return str(error)
    return None


@pytest.hookimpl(trylast=True)  # after `-m` has had its say: nothing is fetched for the default suite
def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.nodeid.startswith("tests/peft_suite/")]
    if ours and problem():  # said once, by `peft_tests`
        config.hook.pytest_deselected(items=ours[1:])
        items[:] = [item for item in items if item not in ours[1:]]


@pytest.fixture(scope="session", autouse=True)
def peft_tests():
    if (said := problem()) is not None:
        pytest.fail(said, pytrace=False)


def pytest_terminal_summary(terminalreporter):
    counts: defaultdict[str, Counter] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error"):
        reports = (r for r in terminalreporter.stats.get(outcome, []) if isinstance(r, pytest.TestReport))
        for report in reports:  # a file that cannot be imported is an error too
            family, _, deselected = dict(report.user_properties).get("peft_suite", "").partition(" ")
            if family:
                counts[family][deselected if deselected and outcome == "passed" else outcome] += 1
    if counts:
        terminalreporter.section("PEFT's own tests")
        columns = ("passed", "deselected", "failed", "error")
        terminalreporter.write_line("".join(f"{name:>20}" for name in ("", *columns)))
        for family, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
            terminalreporter.write_line(f"{family:>20}" + "".join(f"{count[column]:>20}" for column in columns))
