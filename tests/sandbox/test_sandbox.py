"""The sandbox: what runs in it, what gets out of it, what it leaves, and where it refuses to run.

Nothing here is simulated: the programs really try. Each one that must not pass would be right if its trick worked.
"""

import contextlib
import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest

from peft_onelayer import sandbox
from peft_onelayer.sandbox import child as sandbox_child

RIGHT = "def double(x): return 2 * x\n"
TESTS = "assert double(4) == 8"
SECRET = "8" + "1725" * 3  # an expected value that the program is not told

pytestmark = pytest.mark.skipif(bool(sandbox.available()), reason=str(sandbox.available()))


def run(program, tests=TESTS, functions=("double",), **limits):
    return sandbox.run([program], tests, functions, **limits)


def programs(text):
    """Split a text at its lines "# --- name" into programs by name."""
    parts = re.split(r"^# --- (.*)\n", text.lstrip("\n"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def see(look, **limits):
    """Return what `look()` of a program sees, by letting the tests fail with it."""
    outcome = run(look, "assert False, repr(look())", ["look"], **limits)
    assert not outcome.passed
    return outcome.reason.removeprefix("AssertionError ").removesuffix(" in assert False, repr(look())")


def marked(marker):
    """Return the processes of the machine that have named themselves `marker`."""
    found = []
    for path in glob.glob("/proc/[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [path] if Path(path).read_text().strip() == marker else []
    return found


@pytest.fixture
def marker():
    return uuid.uuid4().hex[:12]


def name_itself(marker):
    return f"import ctypes; ctypes.CDLL(None).prctl(15, b'{marker}', 0, 0, 0)\n"  # PR_SET_NAME, which children keep


# --- what runs ---


@pytest.mark.parametrize(
    "literal",
    [
        "None",
        "True",
        "0",
        "-(10 ** 5000)",
        "0.1",
        "-0.0",
        "float('inf')",
        r"'\ud800\x00\xe9'",
        r"b'\x00\xff'",
        "1 - 2j",
        "[]",
        "(1, (2, [3]), 'x')",
        "{'a': {1: {2.5, 'b'}}, (1, 2): None, None: []}",
        "frozenset([1])",
        "set()",
    ],
)
def test_plain_data_crosses_unchanged(literal):
    # the tests evaluate the literal, send it to the program, and get it back
    same = "got == want and type(got) is type(want) and repr(got) == repr(want)"
    tests = f"want = {literal}\ngot = same(want)\nassert {same}"
    assert run("def same(x): return x", tests, ["same"]) == sandbox.Outcome(True)


def test_nan_keywords_and_derived_types():
    program = """
import collections
def f(x, *, n):
    return [x, collections.Counter("aab"), collections.namedtuple("P", "a b")(1, n), (letter for letter in "ab")]
"""
    tests = """
x, counts, pair, letters = f(float("nan"), n=2)
assert x != x and counts == {"a": 2, "b": 1} and pair == (1, 2) and list(letters) == ["a", "b"]
"""
    assert run(program, tests, ["f"]).passed


def test_the_program_keeps_its_state_between_calls_and_may_use_the_standard_library():
    program = """
import asyncio, dataclasses, decimal, fractions, hashlib, heapq, itertools, random, re, statistics, threading, typing
@dataclasses.dataclass
class A:
    n: "int"
calls = []
async def later(): return len(calls)
def count():
    thread = threading.Thread(target=lambda: calls.append(A(1)))
    thread.start()
    thread.join()
    with open("file", "a") as file: file.write("x")
    with open("file") as file: return asyncio.run(later()), len(file.read())
"""
    assert run(program, "assert count() == (1, 1)\nassert count() == (2, 2)", ["count"]).passed


def test_the_first_program_that_compiles_is_run():
    assert sandbox.run(["def double(x) return", RIGHT, "1 / 0"], TESTS, ["double"]).passed
    outcome = sandbox.run(["def double(x) return", "(" * 1000], TESTS, ["double"])
    assert not outcome.passed and outcome.reason.startswith("SyntaxError")


def test_reasons():
    assert run(RIGHT, "x = 1\nassert double(4) == 9").reason == "AssertionError in assert double(4) == 9"
    assert run("def double(x): raise KeyError('k')").reason == "KeyError: 'k' in assert double(4) == 8"
    assert run("1 / 0").reason == "ZeroDivisionError: division by zero"
    assert "has no attribute 'double'" in run("x = 1").reason
    assert run("def double(x): return object()").reason.startswith("TypeError: 'object' object is not iterable")


def test_tests_that_cannot_be_run_are_an_error_and_not_a_failure():
    with pytest.raises(ValueError, match="the tests do not compile"):
        run(RIGHT, "assert double(4) ==")
    with pytest.raises(ValueError, match="call double with something that is not plain data"):
        run(RIGHT, "try: double(lambda: 1)\nexcept Exception: pass")


# --- forging the result ---

FORGERIES = programs("""
# --- exit 0 at once
import os; os._exit(0)
# --- sys.exit at once
import sys; sys.exit(0)
# --- exit 0 in the function
import os
def double(x): os._exit(0)
# --- sys.exit in the function
import sys
def double(x): sys.exit(0)
# --- SystemExit in the function
def double(x): raise SystemExit(0)
# --- KeyboardInterrupt in the function
def double(x): raise KeyboardInterrupt
# --- StopIteration in the function
def double(x): raise StopIteration
# --- AssertionError in the function
def double(x): raise AssertionError
# --- exit 0 from a thread
import os, threading
threading.Thread(target=lambda: os._exit(0)).start()
def double(x): return 0
# --- exit 0 at the end
import atexit, os
atexit.register(os._exit, 0)
def double(x): return 0
# --- the mark of a pass on every descriptor
import os
for fd in range(256):
    for text in (b'{"started": true}\\n{"passed": true}\\n', b'\\n{"passed": true}\\n', b'PASSED\\n', b'ok', b'1'):
        try: os.write(fd, text)
        except OSError: pass
def double(x): return 0
# --- the mark of a pass, then exit 0
import os, sys
print('{"passed": true}', flush=True)
print('{"passed": true}', file=sys.stderr, flush=True)
os._exit(0)
# --- equal to everything
class Equal:
    def __eq__(self, other): return True
def double(x): return Equal()
# --- an int equal to everything
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def double(x): return Equal()
# --- a list equal to everything
class Equal(list):
    def __eq__(self, other): return True
def double(x): return Equal()
# --- a string equal to everything
class Equal(str):
    def __eq__(self, other): return True
def double(x): return Equal()
# --- other builtins
import builtins
for name in ("all", "abs", "len", "isinstance", "AssertionError", "compile", "exec"):
    setattr(builtins, name, lambda *a, **k: True)
def double(x): return 0
# --- no modules
import sys
for name in list(sys.modules): sys.modules[name] = None
def double(x): return 0
# --- other globals in all frames
import sys
frame = sys._getframe()
while frame:
    for name in ("TESTS", "tests", "check", "judge", "answer", "reason", "report", "send", "encode"):
        frame.f_globals[name] = lambda *a, **k: None
    frame = frame.f_back
def double(x): return 0
# --- a trace function
import sys, threading
sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)
def double(x): return 0
# --- a crash
import ctypes
def double(x): ctypes.string_at(0)
# --- a crash at once
import ctypes
ctypes.string_at(0)
# --- malformed answers ahead
import os
for data in (b'[true, null]', b'', b'[', b'[true]', b'{}', b'[true, {"eval": "8"}]', b'\\xff', b'[' * 10**6, b'[1, 8]'):
    os.write(21, len(data).to_bytes(8) + data)
def double(x): return 0
# --- an answer without end
import os
os.write(21, (1 << 60).to_bytes(8))
def double(x): return 0
# --- a closed channel
import os
os.closerange(3, 256)
def double(x): return 0
# --- two that answer
import os
os.fork()
def double(x): return 0
# --- equality in the slots of the built-in types
import ctypes
@ctypes.CFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)
def equal(a, b, kind): return True
for kind in (int, float, str, bool, list):
    richcompare = ctypes.c_void_p.from_address(id(kind) + 25 * ctypes.sizeof(ctypes.c_void_p))
    richcompare.value = ctypes.cast(equal, ctypes.c_void_p).value
def double(x): return 0
# --- another type of an int
import ctypes
class Equal(int):
    def __eq__(self, other): return True
def double(x):
    answer = 10**30 - 10**30 + 7**40
    ctypes.py_object.from_address(id(answer) + ctypes.sizeof(ctypes.c_void_p)).value = Equal
    return answer
# --- other values of the small ints
import ctypes
for small in range(-5, 200):
    ctypes.c_uint32.from_address(id(small) + 24).value = 4
def double(x): return 0
# --- other memory of its own functions
import ctypes, sys
code = sys._getframe().f_code
ctypes.memset(id(code), 0, 64)
def double(x): return 0
""")


SLOW_FORGERIES = ("equality in the slots of the built-in types", "other globals in all frames")  # end at the time limit


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.more) if n in SLOW_FORGERIES else n for n in FORGERIES]
)
def test_a_forged_result_does_not_pass(name):
    assert not run(FORGERIES[name], timeout=5, cpu_seconds=2).passed


def test_the_program_never_holds_the_tests():
    # everything that the garbage collector and the frames lead to, and the descriptors; the needle is written backwards
    # so that the search does not find itself
    look = """
import gc, os, sys
needle = "5271" * 3
def look():
    seen, found, todo = set(), [], gc.get_objects() + [sys._getframe(i) for i in range(3)]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or len(seen) > 200_000: continue
        seen.add(id(thing))
        if isinstance(thing, bytes): thing = thing.decode("latin-1")
        if isinstance(thing, str) and needle in thing[::-1]: found.append(thing[:80])
        if isinstance(thing, type(sys._getframe())): todo += [*thing.f_locals.values(), thing.f_back]
        todo += gc.get_referents(thing)
    return len(seen) > 10_000 and found, [fd for fd in range(256) if is_open(fd)]
def is_open(fd):
    try: return bool(os.fstat(fd))
    except OSError: return False
"""
    tests = f"expected = '{SECRET}'\nassert look() == ([], [0, 1, 2, 20, 21]), look()"
    assert run(look, tests, ["look"], cpu_seconds=10, timeout=30) == sandbox.Outcome(True)
    # the search does find what is there
    assert SECRET in see(f"hidden = [['{SECRET}']]\n" + look, cpu_seconds=10, timeout=30)


# --- getting out ---

ESCAPES = programs("""
# --- a socket
import socket; socket.socket()
# --- a Unix socket
import socket; socket.socket(socket.AF_UNIX)
# --- killing the parent
import os; os.kill(os.getppid(), 9)
# --- killing everything
import os; os.kill(-1, 9)
# --- killing its group
import os; os.killpg(0, 9)
# --- 10 GB
bytearray(10 << 30)
# --- 10 GB of shared memory
import mmap; mmap.mmap(-1, 10 << 30)
# --- a file without end
with open("file", "wb") as file:
    while True: file.write(bytes(1 << 20))
# --- files without end
for i in range(10**6):
    with open(str(i), "wb") as file: file.write(bytes(1 << 20))
# --- a fork bomb
import os
while True: os.fork()
# --- threads without end
import threading, time
while True: threading.Thread(target=time.sleep, args=(60,)).start()
# --- higher limits
import resource; resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
# --- root
import os; os.setuid(0)
# --- another program
import subprocess; subprocess.run(["/bin/sh", "-c", "true"])
# --- the processes of the machine
import os; os.listdir("/proc/1")
# --- a device
open("/dev/mem", "rb")
""")


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_fails_with_an_exception(name):
    outcome = run(ESCAPES[name] + "\n" + RIGHT, timeout=20)
    assert not outcome.passed
    assert "Error" in outcome.reason, outcome


def test_denied_system_calls():
    column, _ = sandbox_child.MACHINES[os.uname().machine]
    numbers = {name: both[column] for name, both in sandbox_child.DENIED.items() if both[column] is not None}
    numbers["an x32 call"] = 1 << 30
    look = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def look(): return [name for name, number in {numbers}.items() if not denied(number)]
def denied(number): return libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1
"""
    assert see(look) == "[]"
    assert len(numbers) > 40


def test_denied_values_of_arguments():
    look = """
import ctypes, fcntl, os, resource, struct
libc = ctypes.CDLL(None, use_errno=True)
ours, theirs = os.pipe()
def denied(call, *arguments):
    try: call(*arguments)
    except OSError as error: return error.errno == 1
    return False
def look():
    commands = {"F_SETOWN": 8, "F_SETSIG": 10, "F_SETOWN_EX": 15, "F_NOTIFY": 1026, "F_SETPIPE_SZ": 1031}
    got = [name for name, number in commands.items() if not denied(fcntl.fcntl, ours, number, 4096)]
    got += [number for number in (0x8901, 0x8902) if not denied(fcntl.ioctl, ours, number, struct.pack("i", 1))]
    got += [pid for pid in (1, os.getpid(), 12345) if not denied(resource.prlimit, pid, resource.RLIMIT_CPU, (1, 1))]
    return got
def usual():
    fcntl.fcntl(ours, fcntl.F_SETFD, fcntl.fcntl(ours, fcntl.F_GETFD))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return fcntl.ioctl(ours, 0x541B, bytes(4)) == bytes(4) and fcntl.fcntl(ours, 1032) > 0  # FIONREAD, F_GETPIPE_SZ
"""
    assert run(look, "assert look() == [], look()\nassert usual()", ["look", "usual"]) == sandbox.Outcome(True)


def test_what_a_user_has_only_so_much_of_is_not_used_up():
    """Pipes, timers and watches count for the user, outside of the sandbox too."""
    look = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def look():
    pipes, timers, made = [], 0, ctypes.c_void_p()
    try:
        while True: pipes.append(os.pipe())
    except OSError: pass
    event = (ctypes.c_int * 16)(0, 0, 10, 0)  # a sigevent: SIGUSR1
    while timers < 1000 and libc.timer_create(1, event, ctypes.byref(made)) == 0: timers += 1
    return len(pipes), timers, libc.inotify_init()
"""
    pipes, timers, watches = eval(see(look))
    assert 5 <= pipes <= 9 and timers <= 64 and watches == -1


@pytest.mark.parametrize("call", ["clone", "clone3"])
def test_no_namespace_of_any_kind_below(call):
    """Not a user's, with which the others could be made, nor one of the others."""
    numbers = {"x86_64": {"clone": 56}, "aarch64": {"clone": 220}}[os.uname().machine] | {"clone3": 435}
    look = f"""
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
flags = dict(user=1 << 28, mount=1 << 17, pid=1 << 29, net=1 << 30, uts=1 << 26, ipc=1 << 27, time=1 << 7)
def look():
    got = []
    for name, flag in flags.items():
        for flag in (flag, flag | 1 << 28):
            if {call == "clone"}:
                if flag & 255: continue  # these bits are the signal's
                pid = libc.syscall({numbers["clone"]}, flag | 17, 0, 0, 0, 0)
            else:
                arguments = struct.pack("8Q", flag, 0, 0, 0, 17, 0, 0, 0)
                pid = libc.syscall({numbers["clone3"]}, arguments, len(arguments))
            if pid == 0: os._exit(0)
            if pid > 0: got.append(name)
    return got
"""
    assert see(look) == "[]"


def test_no_user_namespace_below():
    # in one of its own the program would have capabilities again, and could mount file systems without a limit
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]  # clone(CLONE_NEWUSER | SIGCHLD)
    look = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def look(): return libc.syscall({number}, 0x10000000 | 17, 0, 0, 0, 0) or os._exit(0), ctypes.get_errno()
"""
    assert see(look) == "(-1, 1)"


def test_no_connection_reaches_the_host():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "PermissionError" in run(f"import socket; socket.create_connection(('127.0.0.1', {port}))").reason
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_of_the_environment_and_of_the_users_files_is_seen(monkeypatch, tmp_path, marker):
    monkeypatch.setenv("HF_TOKEN", marker)
    (tmp_path / "file").write_text(marker)
    home = os.path.expanduser("~")
    paths = [str(tmp_path / "file"), home, "/home", "/tmp", "/etc/passwd", __file__, sandbox.__file__]
    look = f"""
import ctypes, os
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
def look(): return dict(os.environ), getenv(b"HF_TOKEN"), os.listdir("."), [p for p in {paths} if os.path.exists(p)]
"""
    seen = eval(see(look))
    # the way to the interpreter's libraries may lead through the home folder, of which only that way is there
    assert seen[:3] == ({}, None, []) and set(seen[3]) <= {home, "/home", "/tmp"}
    for folder in seen[3]:
        inside = eval(see(f"import os\ndef look(): return os.listdir({folder!r})"))
        assert all(sys.base_prefix.startswith(os.path.join(folder, name)) for name in inside)


def test_nothing_can_be_written_outside_of_the_working_directory(marker, tmp_path):
    home, temporary = os.path.expanduser("~"), tempfile.gettempdir()
    folders = [str(tmp_path), os.getcwd(), home, temporary, "/tmp", "/var/tmp", "/dev/shm", "/dev", "..", "/"]
    folders += ["/usr/lib", sys.base_prefix, f"{sys.base_prefix}/lib", f"{sys.prefix}/bin"]
    look = f"""
import os
ways = [lambda path: open(path, "w"), os.mkdir, os.mkfifo, lambda path: os.symlink("x", path)]
def look():
    written = []
    for folder in {folders}:
        os.symlink(folder, "link")
        for path in (folder, "link"):
            for way in ways:
                try: way(path + "/{marker}")
                except OSError: continue
                written.append(path)
        os.unlink("link")
    return written
"""
    assert see(look) == "[]"
    assert not [folder for folder in folders if os.path.lexists(os.path.join(folder, marker))]


# --- ending ---


LOOPS = programs("""
# --- at once
while True: pass
# --- in the function
def double(x):
    while True: pass
# --- printing
import os
while True: os.write(1, bytes(1 << 20)); os.write(2, bytes(1 << 20))
# --- forking
import os
while True:
    try: os.fork()
    except OSError: pass
# --- deaf to the CPU limit
import signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
while True: pass
# --- stopped by its own timer
import ctypes
libc = ctypes.CDLL(None)
made, event = ctypes.c_void_p(), (ctypes.c_int * 16)(0, 0, 19, 0)
assert libc.timer_create(1, event, ctypes.byref(made)) == 0
libc.timer_settime(made, 0, (ctypes.c_long * 4)(0, 1000, 0, 1000), None)
while True: pass
# --- zombies
import os
while True:
    try:
        if os.fork() == 0: os._exit(0)
    except OSError: pass
# --- children that wait for children
import os
def down():
    try: pid = os.fork()
    except OSError: pid = 1
    if pid == 0: down()
    while True: pass
down()
# --- threads that never end
import threading
def loop():
    while True: pass
threads = [threading.Thread(target=loop) for _ in range(4)]
for thread in threads: thread.start()
threads[0].join()
# --- blocked signals and a pipe that nobody writes to
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
os.read(os.pipe()[0], 1)
""")
HEAVY = (
    "stopped by its own timer",
    "deaf to the CPU limit",
    "in the function",
    "blocked signals and a pipe that nobody writes to",
    "zombies",
    "children that wait for children",
    "threads that never end",
    "forking",
    "printing",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.more) if n in HEAVY else n for n in LOOPS])
def test_a_loop_without_end_is_ended(name):
    outcome = run(LOOPS[name], timeout=4, cpu_seconds=1)
    assert not outcome.passed and ("limit of" in outcome.reason or "SIGKILL" in outcome.reason)


BOMBS = {
    "powers": "x = 9 ** 9 ** 9 ** 9",
    "a factor of a text": "x = 'a' * (10 ** 12)",
    "nested products of tuples": "x = " + "(" * 60 + "(1,) * 250" + ") * 250" * 60,
    "shifts": "x = 1 << (1 << 62)",
    "minus signs": "x = " + "-" * 1_000_000 + "1",
    "brackets": "x = " + "[" * 100_000 + "]" * 100_000,
    "a long sum": "x = " + "+".join(["1"] * 1_000_000),
    "nested functions": "".join(" " * i + f"def f{i}():\n" for i in range(200)) + " " * 200 + "pass",
    "nested comparisons": "x = " + "(" * 5_000 + "1" + "< 2)" * 5_000,
    "texts that hold texts": "x = " + "f'{" * 90 + "1" + "}'" * 90,
    "attributes": "x" + ".a" * 500_000,
    "names": "; ".join(f"a{i} = {i}" for i in range(200_000)),
    "a null byte": "x = 1\0",
    "a long number": "x = " + "9" * 5_000_000,
    "lambdas": "x = " + "lambda: " * 50_000 + "1",
    "conditions": "x = " + "1 if 1 else " * 50_000 + "1",
    "starred": "x = [" + "*[" * 20_000 + "]" * 20_000 + "]",
    "decorators": "@a\n" * 100_000 + "def f(): pass",
}


@pytest.mark.parametrize(
    "name",
    [name if name == "minus signs" else pytest.param(name, marks=pytest.mark.more) for name in BOMBS],
)
def test_a_bomb_for_the_compiler_ends(name, marker):
    """Whatever the compiler makes of it: the sandbox ends, and what follows in the same process is judged."""
    assert not run(name_itself(marker) + BOMBS[name], timeout=20, cpu_seconds=2).passed
    assert marked(marker) == []


@pytest.mark.more
@pytest.mark.parametrize("way", ["vfork", "posix_spawn", "clone"])
def test_floods_of_processes_end_and_leave_nothing(way, marker):
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    start = {
        "vfork": f"libc.syscall({number}, 0x4111, 0, 0, 0, 0)",  # CLONE_VFORK | CLONE_VM | SIGCHLD
        "posix_spawn": "os.posix_spawn('/usr/bin/true', ['true'], {})",
        "clone": f"libc.syscall({number}, 17, 0, 0, 0, 0)",
    }[way]
    program = name_itself(marker) + textwrap.dedent(f"""
        import ctypes, os
        libc = ctypes.CDLL(None)
        while True:
            try: {start}
            except OSError: pass
    """)
    assert not run(program, timeout=4, cpu_seconds=1).passed
    assert marked(marker) == []


@pytest.mark.more
def test_what_sleeps_and_ignores_signals_is_ended_with_all_its_children(marker):
    # daemons, forked twice, deaf to all signals but SIGKILL
    program = name_itself(marker) + textwrap.dedent("""
        import os, signal, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        for _ in range(2):
            if os.fork() == 0:
                os.fork()
                while True: time.sleep(60)
        while True: time.sleep(60)
    """)
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(run(program, timeout=4)))
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, len(marked(marker)))
        time.sleep(0.05)
    assert outcome == [sandbox.Outcome(False, "time limit of 4 s")]
    assert most > 2  # they were there ...
    assert marked(marker) == []  # ... and are gone when run() returns


def test_a_program_that_passes_leaves_no_process_either(marker):
    program = name_itself(marker) + textwrap.dedent("""
        import os, threading, time
        threading.Thread(target=time.sleep, args=(60,)).start()
        if os.fork() == 0:
            while True: time.sleep(60)
    """)
    assert run(program + RIGHT).passed
    assert marked(marker) == []


def load_sandbox_alone():
    # in processes that tests start, without the package, whose import takes seconds
    return (
        f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parents[1])!r}); import sandbox, sandbox.child\n"
    )


def test_the_sandbox_ends_with_the_process_that_wanted_it(marker):
    program = name_itself(marker) + "import time; time.sleep(300)"
    script = load_sandbox_alone() + f"sandbox.run([{program!r}], '', [], timeout=300)"
    with subprocess.Popen([sys.executable, "-c", script]) as caller:
        wait_until(lambda: marked(marker))
        caller.send_signal(signal.SIGKILL)
    wait_until(lambda: not marked(marker))


def test_the_keeper_may_be_killed_too(marker):
    # what holds the sandbox from outside is gone, and all of the sandbox with it
    program = name_itself(marker) + "import time; time.sleep(300)"
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(run(program, timeout=300)))
    thread.start()
    wait_until(lambda: marked(marker))
    os.kill(keeper_of(marked(marker)[0]), signal.SIGKILL)
    thread.join()
    wait_until(lambda: not marked(marker))
    assert not outcome[0].passed and "killed" in outcome[0].reason


def keeper_of(comm):
    worker = Path(comm).parent
    judge = int(worker.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    return int(Path(f"/proc/{judge}/stat").read_text().rpartition(")")[2].split()[1])


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited 30 s in vain")


# --- where no sandbox can be made ---


def without_namespaces(script):
    """Run a script in a process whose kernel refuses unshare(), as in a container that forbids it."""
    script = load_sandbox_alone() + "sandbox.child.deny_system_calls(['unshare'])\n" + script
    return subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, timeout=120)


def test_refused_without_user_namespaces():
    result = without_namespaces("print(sandbox.available())\nsandbox.run(['x = 1'], '', [])")
    assert "unshare(): Operation not permitted" in result.stdout and "\n" not in result.stdout.strip()
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("sandbox.SandboxError: no sandbox can be made here") and "--unsafe" in last


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root runs into this")
def test_refused_where_the_number_of_processes_cannot_be_limited():
    # in a user namespace that knows no other user than root, which is root outside too
    script = load_sandbox_alone() + "print(sandbox.available())"
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "no sandbox can be made here" in result.stdout and "nothing limits the processes" in result.stdout


def test_refused_on_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sandbox, "available", sandbox.available.__wrapped__)
    with pytest.raises(sandbox.SandboxError, match=r"needs Linux with user namespaces, and this is darwin.*--unsafe"):
        run(RIGHT)


UNSAFE = programs("""
# --- wrong
def double(x): return 0
# --- exit 0
import os; os._exit(0)
# --- a loop
while True: pass
# --- sleep
import time; time.sleep(60)
# --- 10 GB
bytearray(10 << 30)
# --- a socket
import socket; socket.socket()
# --- killing the parent
import os; os.kill(os.getppid(), 9)
# --- a group of its own
import os; os.setpgid(0, 0)
# --- the environment
import os; os.environ["HOME"]
# --- a signal by way of a pipe
import fcntl, os
def parent(pid): return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
ours, theirs = os.pipe()
fcntl.fcntl(ours, 8, parent(parent(os.getppid())))  # F_SETOWN: the process that runs the sandbox
fcntl.fcntl(ours, 10, 9)  # F_SETSIG
fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC)
os.write(theirs, b".")
# --- a limit of another process
import os, resource
def parent(pid): return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
resource.prlimit(parent(parent(os.getppid())), resource.RLIMIT_CPU, (0, 0))
# --- a result by way of its starter's files
import glob, os
def parent(pid): return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
keeper = parent(os.getppid())
for path in glob.glob(f"/proc/{keeper}/fd/[01]") + glob.glob(f"/proc/{parent(keeper)}/fd/*"):
    if int(path.rpartition("/")[2]) <= 2 and str(keeper) not in path: continue  # where the script itself writes
    try: os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b'{"started": true}\\n{"passed": true}\\n')
    except OSError: pass
os.abort()
""")


@pytest.mark.more
def test_unsafe_runs_with_what_limits_there_are(marker):
    child_left_behind = name_itself(marker) + "import os\nif os.fork() == 0:\n    while True: pass\n"
    cases = {"right": child_left_behind + RIGHT} | {name: f"{bad}\n{RIGHT}" for name, bad in UNSAFE.items()}
    cases["wrong"] = UNSAFE["wrong"]
    script = f"""
assert sandbox.available()
for name, program in {cases}.items():
    # the limit on processes counts all that the user has
    limits = dict(timeout=4, cpu_seconds=1, processes=10**6, unsafe=True)
    print(name, sandbox.run([program], {TESTS!r}, ["double"], **limits).passed)
"""
    result = without_namespaces(script)
    assert result.stdout.splitlines() == ["right True", *(f"{name} False" for name in UNSAFE)]
    assert "runs without a sandbox" in result.stderr
    wait_until(lambda: not marked(marker))


def test_a_sandbox_that_breaks_is_an_error_and_not_a_failure(monkeypatch):
    monkeypatch.setattr(sandbox, "_CHILD", Path("/nonexistent.py"))
    with pytest.raises(sandbox.SandboxError, match="before it ran anything"):
        run(RIGHT)
