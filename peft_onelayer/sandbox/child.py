"""The process inside the sandbox: `sandbox.run` starts this file as a script, with nothing on its path but the stdlib.

Three processes, each the parent of the next:

    keeper   makes the namespaces, waits for the judge or the clock, kills what is left
    judge    process 1 of the new process namespace: runs the tests, and alone can report what came of them
    worker   runs the program, answers the judge's calls; has never held the tests or the channel of the result

Judge and worker exchange plain data as JSON over two pipes, so that what the tests compare are the judge's own objects.
The keeper's standard input and output are one socket, because others of the same user can open a pipe in /proc and
write to it. The keeper reads from it the length of the request (8 bytes), the request and the tests; it writes one JSON
object a line: {"refused": why}, or {"started": true} and then {"passed": true}, {"failed": why} or {"invalid": why}.
`peft_onelayer/sandbox/__init__.py` says what the sandbox covers.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import resource
import select
import signal
import struct
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes longer than making the namespaces
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

LINUX = sys.platform == "linux"
NOBODY = 65534
MAX_ANSWER = 1 << 26  # bytes
# Of each process. A pipe takes 16 pages of the 16,384 that a user's pipes may have before the kernel makes new ones
# smaller (fs.pipe-user-pages-soft): seven processes with nine pipes each take 1,008.
OPEN_FILES = 24
MAX_REASON = 300  # characters; a line of them fits into one atomic write to a pipe (4096 bytes)

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h, linux/seccomp.h, linux/audit.h
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CAPABILITY_VERSION = 0x20080522
SECCOMP_MODE_FILTER, SECCOMP_KILL, SECCOMP_EPERM, SECCOMP_ALLOW = 2, 0x80000000, 0x50001, 0x7FFF0000

# Calls that the worker may not make, with their numbers on x86_64 and aarch64 (None: not there): sockets; signals;
# leaving the process group; memory that no limit counts (System V, memfd); other processes' memory and priority; what
# the kernel counts for the user as a whole (inotify); what Python programs do not use and attacks on the kernel do.
DENIED = {
    "socket": (41, 198),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "mount_setattr": (442, 442),
    "pivot_root": (155, 41),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "setpriority": (141, 140),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
}
# Calls that the worker may not make with one of these values of an argument, by its index: an owner to whom the kernel
# sends signals for the worker, in files and sockets; watching a directory; another size of a pipe, of which a user has
# only so much. Limits of another process than the caller's (pid 0) are not for the worker either.
F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY, F_SETPIPE_SZ, FIOSETOWN, SIOCSPGRP = 8, 10, 15, 1026, 1031, 0x8901, 0x8902
DENIED_VALUES = {
    "fcntl": ((72, 25), 1, (F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY, F_SETPIPE_SZ)),
    "ioctl": ((16, 29), 1, (FIOSETOWN, SIOCSPGRP)),
}
ALLOWED_VALUES = {"prlimit64": ((302, 261), 0, (0,))}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH


class InvalidTests(BaseException):
    """The tests themselves cannot be run; not an Exception, so that no test catches it."""


class ProgramError(Exception):
    """What the tests see of an exception in the program, whatever its type, and of the program's end."""


# --- plain data -----------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Return `value` as what JSON can hold: None, numbers, strings, lists as they are, the rest as {type: content}."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"iterator": [encode(item) for item in iter(value)]}  # TypeError for anything else


DECODERS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
    "iterator": iter,
}


def decode(tagged: dict[str, Any]) -> Any:
    """Undo `encode` for one JSON object; the objects made are of exactly these built-in types, whoever wrote them."""
    ((kind, content),) = tagged.items()
    return DECODERS[kind](content)


def send(fd: int, message: Any) -> None:
    """Write `message`, which is encoded already."""
    data = json.dumps(message).encode()
    view = memoryview(len(data).to_bytes(8) + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> Any:
    size = int.from_bytes(read(fd, 8))
    if size > MAX_ANSWER:
        raise ProgramError(f"an answer of {size} bytes, more than {MAX_ANSWER}")
    return json.loads(read(fd, size), object_hook=decode)


def read(fd: int, size: int) -> bytes:
    """Read exactly `size` bytes; EOFError where there are fewer."""
    chunks = []
    while size:
        if not (chunk := os.read(fd, min(size, 1 << 20))):
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def report(fd: int, **line: bool | str) -> None:
    os.write(fd, json.dumps(line).encode() + b"\n")


# --- the keeper -----------------------------------------------------------------------------------------------------


def keep() -> None:
    request = json.loads(read(0, int.from_bytes(read(0, 8))))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a process 1 is immune to signals that it has no handler for
    null = os.open(os.devnull, os.O_RDWR)
    try:
        if request["namespaces"]:
            enter_namespaces(request["scratch"])
    except OSError as error:
        report(1, refused=str(error))
        return
    if LINUX:
        LIBC.prctl(PR_SET_DUMPABLE, 0)  # the worker, which has the same user, cannot trace keeper and judge
    report(1, started=True)
    judge_lives, held_by_judge = os.pipe()
    judge_pid = os.fork()
    if judge_pid == 0:
        judge(request, null)
    os.close(held_by_judge)
    os.close(0)
    poller = select.poll()
    poller.register(judge_lives, select.POLLIN)
    poller.register(1, 0)  # an error there: whoever wanted the result is gone
    if not poller.poll(request["timeout"] * 1000):
        report(1, failed=f"time limit of {request['timeout']:g} s")
    if request["namespaces"]:
        os.kill(judge_pid, signal.SIGKILL)
        os.waitpid(judge_pid, 0)  # returns when every process of the namespace is gone (kernel: zap_pid_ns_processes)
    else:
        os.killpg(0, signal.SIGKILL)


def enter_namespaces(scratch: int) -> None:
    """Give this process and its children to come their own users, processes, network, IPC and file system.

    The new root holds the interpreter's libraries, read-only, and /work, an empty file system of `scratch` bytes.
    """
    if os.uname().machine not in MACHINES:
        raise OSError(f"no table of system calls for {os.uname().machine}, only for {' and '.join(MACHINES)}")
    with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("1000")  # where memory runs out, this goes first and not the training
    unshare_with_mapped_ids()
    # Covered by the new root, so it must be a folder that is everywhere and that holds nothing that Python needs.
    root = "/proc"
    libc("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    libc("mount", b"tmpfs", root.encode(), b"tmpfs", 0, b"mode=755,size=1m")
    prefixes = {sys.base_prefix, sys.base_exec_prefix, "/usr", ""}
    libraries = {f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64")}
    for path in [*sorted(libraries), "/etc/ld.so.cache", os.devnull]:
        target = root + path
        if not os.path.exists(path) or os.path.exists(target):  # the latter inside of another one
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        libc("mount", path.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    os.mkdir(f"{root}/work")
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    libc("syscall", MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    libc("mount", b"tmpfs", f"{root}/work".encode(), b"tmpfs", 0, b"mode=777,nr_inodes=1024,size=%d" % scratch)
    # Not pivot_root: the kernel lets no process below a chroot make a user namespace, in which it would have
    # capabilities again (kernel/user_namespace.c, create_user_ns), and without capabilities none leaves a chroot.
    os.chroot(root)
    os.chdir("/work")
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))


def unshare_with_mapped_ids() -> None:
    """Enter the namespaces as user and group `NOBODY`, which outside is nobody for root and oneself for anyone else."""
    ours, theirs = os.pipe()
    keeper = os.getpid()
    helper = os.fork()  # a process's ids are mapped from outside of its namespace
    if helper == 0:
        os.close(theirs)
        if not os.read(ours, 1):  # unshare() failed
            os._exit(1)
        try:
            with open(f"/proc/{keeper}/setgroups", "w", encoding="utf-8") as file:
                file.write("deny")
            # No limit on processes holds for the real root (kernel/fork.c, copy_process), so that the program must not
            # be root outside. Where only root is mapped, inside a container, that root is somebody else.
            two = os.geteuid() == 0 and is_mapped("uid") and is_mapped("gid")
            for kind, own in (("gid", os.getegid()), ("uid", os.geteuid())):
                lines = f"{own} {own} 1\n{NOBODY} {NOBODY} 1" if two else f"{NOBODY} {own} 1"
                with open(f"/proc/{keeper}/{kind}_map", "w", encoding="utf-8") as file:
                    file.write(lines)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    libc("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC)
    os.write(theirs, b".")
    _, status = os.waitpid(helper, 0)
    os.close(ours)
    os.close(theirs)
    if number := os.waitstatus_to_exitcode(status):
        raise OSError(number, f"mapping the user: {os.strerror(number)}")


def is_mapped(kind: str) -> bool:
    with open(f"/proc/self/{kind}_map", encoding="utf-8") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    return any(start <= NOBODY < start + count for start, _, count in ranges)


def libc(name: str, *arguments: Any) -> None:
    """Call a function of the C library; OSError where it returns -1."""
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), f"{name}(): {os.strerror(ctypes.get_errno())}")


LIBC = ctypes.CDLL(None, use_errno=True)


# --- the judge ------------------------------------------------------------------------------------------------------


def judge(request: dict[str, Any], null: int) -> NoReturn:
    """Run the tests against a worker, report, and end; the end of process 1 ends every process of the namespace."""
    if LINUX:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from_judge, to_worker = os.pipe()
    from_worker, to_judge = os.pipe()
    worker = os.fork()
    if worker == 0:
        work(request, null, from_judge, to_judge)
    os.close(from_judge)
    os.close(to_judge)
    tests = b"".join(iter(lambda: os.read(0, 1 << 20), b"")).decode()
    result = os.dup(1)
    for fd in range(3):
        os.dup2(null, fd)
    set_limits(request)

    def answer() -> Any:
        try:
            finished, value = receive(from_worker)
        except EOFError:
            _, status = os.waitpid(worker, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGXCPU:
                raise ProgramError(f"CPU time limit of {request['cpu_seconds']} s") from None
            end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            raise ProgramError(f"the program {end}") from None
        if finished is not True:
            raise ProgramError(value)
        return value

    def call(name: str, *arguments: Any, **keywords: Any) -> Any:
        try:
            send(to_worker, encode([name, arguments, keywords]))
        except TypeError as error:
            raise InvalidTests(f"the tests call {name} with something that is not plain data: {error}") from error
        except BrokenPipeError:
            pass  # the worker is gone, which answer() tells
        return answer()

    namespace = {name: functools.partial(call, name) for name in request["functions"]}
    try:
        try:
            code = compile(tests, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise InvalidTests(f"the tests do not compile: {error}") from error
        answer()  # the program's own statements have run
        exec(code, namespace | {"__name__": "tests"})
    except InvalidTests as error:
        report(result, invalid=str(error)[:MAX_REASON])
    except BaseException as error:
        report(result, failed=reason(error, tests))
    else:
        report(result, passed=True)
    os._exit(0)


def reason(error: BaseException, tests: str) -> str:
    """Return the exception and the line of the tests that it came from."""
    step, line = error.__traceback__, ""
    while step:
        if step.tb_frame.f_code.co_filename == "tests":
            line = tests.splitlines()[step.tb_lineno - 1].strip()
        step = step.tb_next
    text = str(error) if isinstance(error, ProgramError) else f"{type(error).__name__} {error}".strip()
    return f"{text} in {line}"[:MAX_REASON] if line else text[:MAX_REASON]


# --- the worker -----------------------------------------------------------------------------------------------------


def work(request: dict[str, Any], null: int, from_judge: int, to_judge: int) -> NoReturn:
    """Run the first of the programs that compiles, then its functions as the judge asks for them."""
    for fd in range(3):
        os.dup2(null, fd)
    os.dup2(from_judge, 20)  # above every descriptor so far, none of which may stay open
    os.dup2(to_judge, 21)
    os.closerange(3, 20)
    if request["namespaces"]:
        os.setsid()
    os.environ.clear()
    set_limits(request)
    if LINUX:
        deny_system_calls()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = ["program"]
    try:
        exec(first_that_compiles(request["programs"]), module.__dict__)
    except BaseException as error:
        send(21, [False, f"{type(error).__name__}: {error}"])
        os._exit(1)
    send(21, [True, None])
    while True:
        name, arguments, keywords = receive(20)
        try:
            message = [True, encode(getattr(module, name)(*arguments, **keywords))]
        except BaseException as error:
            message = [False, f"{type(error).__name__}: {error}"]
        send(21, message)


def first_that_compiles(programs: list[str]) -> types.CodeType:
    errors = []
    for program in programs:
        try:
            return compile(program, "program", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            errors.append(error)
    raise errors[0]


def set_limits(request: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: request["cpu_seconds"],
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_FSIZE: request["scratch"],
        resource.RLIMIT_NPROC: request["processes"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if LINUX:
        limits[resource.RLIMIT_MSGQUEUE] = 0
        limits[resource.RLIMIT_SIGPENDING] = 64  # timers and signals under way, of which the user has only so many
    for kind, limit in limits.items():
        _, highest = resource.getrlimit(kind)
        last = limit + 1 if kind == resource.RLIMIT_CPU else limit  # SIGXCPU, and SIGKILL where that is ignored
        if highest != resource.RLIM_INFINITY:
            last = min(last, highest)
        resource.setrlimit(kind, (min(limit, last), last))


def deny_system_calls(names: Iterable[str] = DENIED) -> None:
    """Let these calls fail with EPERM from here on, in this process and all that it starts."""
    if os.uname().machine not in MACHINES:
        return
    column, architecture = MACHINES[os.uname().machine]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
    number, machine, argument = 0, 4, 16  # offsets in struct seccomp_data, linux/seccomp.h; arguments have 8 bytes
    allow, deny = (end, 0, 0, SECCOMP_ALLOW), (end, 0, 0, SECCOMP_EPERM)
    steps = [(load, 0, 0, machine), (equal, 1, 0, architecture), (end, 0, 0, SECCOMP_KILL), (load, 0, 0, number)]
    steps += [(at_least, 0, 1, 1 << 30), deny]  # the x32 names of the same calls
    for numbers in (DENIED[name] for name in names):
        if (denied := numbers[column]) is not None:
            steps += [(equal, 0, 1, denied), deny]
    for otherwise, values_of in ((allow, DENIED_VALUES), (deny, ALLOWED_VALUES)):
        for numbers, index, values in values_of.values():
            block = [(load, 0, 0, argument + 8 * index)]
            for value in values:
                block += [(equal, 0, 1, value), deny if otherwise is allow else allow]
            steps += [(equal, 0, len(block) + 1, numbers[column]), *block, otherwise]
    steps.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    libc("prctl", PR_SET_NO_NEW_PRIVS, one, zero, zero, zero)
    libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HP", len(steps), ctypes.addressof(code)))


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    keep()
