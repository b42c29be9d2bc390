# The whole workflow: `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One more than the cores of a small machine: slow tests wait for rounds for most of their time.
WORKERS ?= 3

.PHONY: demo test test-fast nightly check bench wheel clean

demo: $(STAMP)  ## train a small model with real peers on this machine
	$(BIN)/potluck demo

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

test-fast: $(STAMP)  ## without those that take more than ten seconds or need root
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not privileged" tests

nightly: $(STAMP)  ## a thousand new examples of each property, two thousand random swarms with random faults (hours)
	$(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=explore -m "not slow and not privileged" tests/unit
	POTLUCK_SEEDS=2000 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/sim -k random_swarms

check: $(STAMP)  ## style, types, and the built wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/smoke_wheel.py

bench: $(STAMP)  ## every benchmark, in its quick form
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
