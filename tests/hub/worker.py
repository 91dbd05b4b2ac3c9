"""Runs `onelayer` commands and Python code one after another, each as a fresh process would but for the imports.

HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported, so they are set for this process. Each line of
standard input is a JSON object with the "arguments" of a command, or "code", and "environment"; answers likewise.
"""

import contextlib
import io
import json
import os
import sys
import traceback

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
    answer = {"code": ended, "out": out.getvalue(), "err": err.getvalue().splitlines(), "result": names.get("result")}
    print(json.dumps(answer), file=answers, flush=True)
