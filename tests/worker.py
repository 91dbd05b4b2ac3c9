"""A process that runs `onelayer` commands and Python code one after another, each as a fresh process would but for the
imports.

    python tests/worker.py [MODULE ...]

runs it; the modules named are such that cannot be imported there. Each line of standard input is a JSON object with the
"arguments" of a command, or "code", and "environment"; answers likewise.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from types import SimpleNamespace

HEAVY = ("torch", "peft", "transformers", "trl", "datasets", "accelerate")  # their imports take seconds


class Worker:
    """The process, and how to talk to it.

    Args:
        environment: of the process; what is read when a library is imported has to be set here.
        blocked: modules that cannot be imported there.
    """

    def __init__(self, environment=None, blocked=()):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *blocked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )

    def __call__(self, *arguments, code=None, environment=None):
        """Run a command or `code`; the answer has code, out, err (lines), and `result`, a variable of the code."""
        wanted = {"environment": environment or {}}
        wanted |= {"code": code} if code else {"arguments": [str(argument) for argument in arguments]}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve():
    from onelayer_cli.main import main

    answers = sys.stdout
    for line in sys.stdin:
        wanted = json.loads(line)
        before = dict(os.environ)
        os.environ.update(wanted["environment"])
        out, err, ended = io.StringIO(), io.StringIO(), 0
        names = {}
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if "code" in wanted:
                    exec(wanted["code"], names)
                else:
                    sys.argv = ["onelayer", *wanted["arguments"]]
                    main()
            except SystemExit as end:
                ended = end.code
            except Exception:
                ended = 99
                traceback.print_exc()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        answer = {"code": ended, "out": out.getvalue(), "err": err.getvalue().splitlines()}
        print(json.dumps(answer | {"result": names.get("result")}), file=answers, flush=True)


if __name__ == "__main__":
    for blocked_module in sys.argv[1:]:
        sys.modules[blocked_module] = None
    serve()
