"""What `import peft_onelayer` costs on top of `import peft`, and that it brings in neither trl nor datasets.

Fresh processes, the two in turn, so that a change of the machine's speed hits both; the ratio is taken pair by pair.
Aim: below 1.15.

    python examples/benchmarks/import_time.py [--pairs N]
"""

import argparse
import statistics
import subprocess
import sys

TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
LOADED = "import peft_onelayer, sys; print(*sorted({'trl', 'datasets', 'matplotlib'} & sys.modules.keys()))"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    for module in ("peft", "peft_onelayer"):  # warm the file cache
        run(TIMED.format(module))
    times = [(float(run(TIMED.format("peft"))), float(run(TIMED.format("peft_onelayer")))) for _ in range(pairs)]
    ratios = sorted(ours / peft for peft, ours in times)
    print(f"import peft           median {statistics.median(t[0] for t in times):.2f} s of {pairs}")
    print(f"import peft_onelayer  median {statistics.median(t[1] for t in times):.2f} s of {pairs}")
    print(f"ratio                 median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    print(f"of trl, datasets, matplotlib it loads: {run(LOADED) or 'none'}")


if __name__ == "__main__":
    main()
