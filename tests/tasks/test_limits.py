"""The limit on the time and memory of a reward: what passes it, what it counts, what it leaves behind."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from peft_onelayer.tasks import limits

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork()")

SCORERS = """
import os, signal, sys, threading, time, subprocess

def make(argument):
    made.append(argument)
    if argument == "broken":
        raise KeyError("no such scorer")
    return score

made = []

def score(what):
    if what == "loop":
        while True: pass
    if what == "in C":
        return 9 ** 9 ** 9
    if what == "sleep":
        time.sleep(600)
    if what == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                while True: pass
            except BaseException: pass
    if what == "thread":
        thread = threading.Thread(target=score, args=("loop",))
        thread.start()
        thread.join()
    if what == "memory":
        return len(bytearray(4 << 30))
    if what == "exit":
        sys.exit()
    if what == "hard exit":
        os._exit(1)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "left-by-a-scorer"])
        time.sleep(600)
    if what == "print":
        print("printed " * 10_000)
    if what == "raise":
        raise ValueError("no score")
    if what == "pid":
        return os.getpid()
    if what == "parent":
        return os.getppid()
    if what == "session":
        return os.getsid(0)
    if what == "cuda":
        return float(os.environ["CUDA_VISIBLE_DEVICES"] == "")
    if what == "made":
        return len(made)
    return float(len(what))
"""


@pytest.fixture(autouse=True)
def scorers(tmp_path, monkeypatch):
    (tmp_path / "scorers_of_a_test.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    limits._stop()  # another test's has another path
    yield
    limits._stop()


def score(*calls, seconds=0.2):
    return limits.score("scorers_of_a_test:make", "", [(call,) for call in calls], seconds=seconds)


def serving():
    return [process for process in psutil.Process().children() if "scorer.serve" in " ".join(process.cmdline())]


def gone(pid):
    """Wait until the process `pid` is neither running nor a zombie."""
    for _ in range(400):
        if not psutil.pid_exists(int(pid)):
            return True
        time.sleep(0.05)
    return False


OVER = ["loop", "in C", "sleep", "deaf", "thread", "memory", "exit", "hard exit", "crash", "child"]


def test_what_passes_the_limit_is_none_and_the_others_have_their_scores():
    calls = [name for one in OVER for name in ("ab", one)] + ["abc"]
    assert score(*calls) == [2.0, None] * len(OVER) + [3.0]
    (server,) = serving()
    assert server.children(recursive=True) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if "left-by-a-scorer" in (p.info["cmdline"] or [])]


def test_a_scorer_is_made_once_and_its_output_does_not_matter():
    assert score("made", "print", "made") == [1.0, 5.0, 1.0]
    assert score("loop", "made") == [None, 1.0]
    assert limits.score("scorers_of_a_test:make", "other", [("made",)]) == [2.0]


def test_the_process_serves_all_batches_and_is_apart_from_this_one():
    (parent, session, cuda), (again,) = score("parent", "session", "cuda"), score("parent")
    assert parent == again != os.getpid() and session == parent != os.getsid(0) and cuda == 1.0


def test_a_scorer_that_fails_is_an_error_in_one_line_and_the_next_batch_is_served():
    for call, message in (
        (lambda: score("a", "raise"), "ValueError: no score"),
        (broken, "KeyError: 'no such scorer'"),
    ):
        with pytest.raises(limits.ScorerError) as raised:
            call()
        assert str(raised.value) == message
        assert score("abc") == [3.0]


def broken():
    return limits.score("scorers_of_a_test:make", "broken", [("a",)])


def test_a_process_that_somebody_ended_is_started_again():
    (parent,) = score("parent")
    os.kill(int(parent), signal.SIGKILL)
    (other,) = score("parent")
    assert other != parent and gone(parent)


def test_threads_share_the_process():
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: score("x" * n, "loop", "y" * n)})) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [float(n), None, float(n)] for n in range(3)} and len(serving()) == 1


def in_a_child(queue):
    queue.put([*score("parent", "loop", "ab"), os.getpid()])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.more)])
def test_a_child_process_has_its_own(method):
    (ours,) = score("parent")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(queue,), daemon=True)
    child.start()
    theirs, over, length, pid = queue.get(timeout=120)
    child.join()
    assert (over, length) == (None, 2.0) and theirs != ours
    assert gone(pid) and gone(theirs)  # it ends with the process that started it
    assert score("parent") == [ours]


def run(script, folder):
    """Start a Python process that scores; it prints the pid of its server first."""
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom peft_onelayer.tasks import limits\n{script}"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who started the tests may ignore it
    )


LOOPING = """
pid, = limits.score("scorers_of_a_test:make", "", [("parent",)])
print(int(pid), flush=True)
limits.score("scorers_of_a_test:make", "", [("loop",)] * 3, seconds=200)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.more), signal.SIGKILL]
)
def test_nothing_is_left_of_a_process_that_is_ended_while_it_scores(number, tmp_path):
    with run(LOOPING, tmp_path) as process:
        server = psutil.Process(int(process.stdout.readline()))
        while not server.children():
            time.sleep(0.02)
        (fork,) = server.children()
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
        assert ("KeyboardInterrupt" in process.stderr.read()) == (number == signal.SIGINT)
    assert gone(server.pid) and gone(fork.pid)


def test_nothing_is_left_of_a_process_that_ends_well(tmp_path):
    with run(LOOPING.partition('limits.score("scorers_of_a_test:make", "", [("loop"')[0], tmp_path) as process:
        pid = process.stdout.readline()
        assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    assert gone(pid)


def test_after_an_interruption_the_next_batch_gets_its_own_scores(monkeypatch):
    """The interruption comes while the answer is read, as Ctrl-C does; the answer would be there afterwards."""

    def interrupted(file):
        raise KeyboardInterrupt

    score("a")
    with monkeypatch.context() as patch:
        patch.setattr(limits, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score("abcdef")
    assert score("ab") == [2.0] and len(serving()) == 1


def test_awkward_texts_cross_unchanged():
    texts = ["\0" * 3, "\ud800", "٣" * 5, "x" * 3_000_000, ""]
    assert score(*texts) == [float(len(text)) for text in texts]
    assert score(*["ab"] * 5_000) == [2.0] * 5_000
    assert score() == []


def test_over_the_limit_is_0_and_counted_in_every_call():
    log = []
    assert limits.settle([1.0, None, 0.5, None], {"log_metric": lambda *args: log.append(args)}) == [1.0, 0.0, 0.5, 0.0]
    assert limits.settle([1.0], {"log_metric": lambda *args: log.append(args)}) == [1.0]
    assert log == [(limits.OVER_LIMIT, 2.0), (limits.OVER_LIMIT, 0.0)]
    assert limits.settle([None], {}) == [0.0]


def test_no_file_is_left_open():
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        score("a", "loop")
    opened = len(os.listdir("/dev/fd"))
    limits._stop()
    assert opened <= before + 2 and len(os.listdir("/dev/fd")) <= before
    assert pathlib.Path(limits.__file__).with_name("scorer.py").is_file()
