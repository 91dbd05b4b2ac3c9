"""What goes wrong while an output is written, made to happen: a kill at a chosen moment, a disk of a chosen size."""

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile", "shutil.rmtree", "fcntl.flock")
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
NO_NAMESPACES = "no namespaces here"


def killed_at(moment, run):
    """Run `run` in a copy of this process that is killed at its `moment`-th event on files; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        left = moment

        def hook(event, args):
            nonlocal left
            if event in EVENTS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sys.addaudithook(hook)
            try:
                run()
            finally:
                os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def hidden(folder):
    """Names below `folder` of what is not finished, and of locks."""
    return sorted(path.name for path in Path(folder).rglob("*") if "partial-" in path.name or "lock" in path.name)


def on_a_disk_of(size, disk, run):
    """`run(disk)` in a copy of this process in which `disk` is a file system of `size` bytes; what it returns."""

    def inside(answer):
        uid, gid = os.getuid(), os.getgid()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
            answer.put(NO_NAMESPACES)
            return
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path("/proc/self", name).write_text(text, encoding="utf-8")
        if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, f"size={size}".encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        answer.put(run(disk))

    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=inside, args=(answer,))
    process.start()
    found = []
    reader = threading.Thread(target=lambda: found.append(answer.get()), daemon=True)
    reader.start()
    process.join(300)
    reader.join(10)
    assert process.exitcode == 0 and found, "the process ended before it answered"
    if found[0] == NO_NAMESPACES:
        pytest.skip(NO_NAMESPACES)
    return found[0]


def command(*arguments):
    """Run a command in this process: (exit code, lines on stderr, stdout)."""
    from onelayer_cli.main import main

    out, err, given = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["onelayer", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        return ended.code, err.getvalue().splitlines(), out.getvalue()
    finally:
        sys.argv = given
