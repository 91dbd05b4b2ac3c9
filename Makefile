# make demo and make test need Python 3.11+ and make; they set up .venv by themselves, through constraints.txt.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo docs test test-more compat real slow peft-suite lint format bench trl-table wheel clean

demo: $(READY)
	$(BIN)/onelayer demo

# Two processes, each with one thread. A file's tests stay together; the files begin in their own order, which ends with
# short ones.
PYTEST_ON_TWO := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST_ON_TWO)

# What is beyond the default suite: repetitions, large parametrizations, longer runs.
test-more: $(READY)
	$(PYTEST_ON_TWO) -m "more and not slow"

# On pretrained models in $ONELAYER_MODELS (default ~/.cache/onelayer-models), in one thread.
real: $(READY)
	$(BIN)/python -m pytest -m real tests/real

slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The core of the suite at the lowest and at the newest versions of the dependencies, in environments of its own.
compat:
	$(PYTHON) tests/compat.py

peft-suite: $(READY)
	$(BIN)/python -m pytest -m slow --disable-warnings tests/peft_suite

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every benchmark that a CPU can run, one table at the end.
bench: $(READY)
	$(BIN)/python examples/benchmarks/bench.py

# Trains every trainer of TRL and writes what came out into docs/trainers.md.
trl-table: $(READY)
	TRL_TABLE=write $(BIN)/python -m pytest tests/trl -m "slow or not slow"

# Writes what docs/ says of the code: commands, public names, fields, algorithms.
docs: $(READY)
	$(BIN)/python docs/generate.py

wheel: $(READY)
	$(BIN)/python -m build --outdir dist .

# The stamp is written last, so an interrupted installation starts again and a finished one is not repeated.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "peft-onelayer needs Python 3.11 or later; none was found (set PYTHON=...)"; exit 1; }
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tasks,slurm]'
	@touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache onelayer-demo
