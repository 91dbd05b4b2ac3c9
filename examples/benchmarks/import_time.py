"""What `import peft_onelayer` costs, alone and beside `import peft`, and that it loads no large library by itself.

Fresh processes in turn, so that a change of the machine's speed hits all; ratios are taken round by round. Processor
time, so that another process on the machine does not count. Aim: both ratios below 1.15.

    python examples/benchmarks/import_time.py [--rounds N]
"""

import argparse
import statistics
import subprocess
import sys

from bench import row

IMPORTS = ("peft", "peft_onelayer", "peft_onelayer, peft")
TIMED = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
LARGE = "{'torch', 'peft', 'transformers', 'trl', 'datasets', 'matplotlib', 'numpy'}"
LOADED = f"import peft_onelayer, sys; print(*sorted({LARGE} & sys.modules.keys()))"
REGISTERED = "import peft_onelayer, peft; print('SINGLE_LAYER' in peft.PEFT_TYPE_TO_TUNER_MAPPING)"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, encoding="utf-8"
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    run("import peft")  # warms the file cache
    times: dict[str, list[float]] = {names: [] for names in IMPORTS}
    for _ in range(rounds):
        for names in IMPORTS:
            times[names].append(float(run(TIMED.format(names))))
    for names in IMPORTS:
        ratios = sorted(ours / peft for ours, peft in zip(times[names], times["peft"], strict=True))
        if names != "peft":
            row(f"import {names} / import peft, CPU time", statistics.median(ratios), 1 if "," in names else None)
        print(
            f"import {names:20} median {statistics.median(times[names]):.3f} s of {rounds}; over import peft: "
            f"median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )
    print(f"of {LARGE} it loads by itself: {run(LOADED) or 'none'}")
    print(f"the method is registered once peft is imported: {run(REGISTERED)}")


if __name__ == "__main__":
    main()
