# make demo and make test set up everything they need in .venv; constraints.txt pins the tested versions.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The lint and type checks are quick; the tests share the cores among two workers of one thread each.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fuzz lint bench bench-suites audit clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(INSTALLED) ## create .venv with fastpo and its development extras

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED) ## the main job on an embedded task: DPO, γ-DPO, SimPO and γ-SimPO from one start
	$(BIN)/fastpo demo

test: $(INSTALLED) ## the gate: every test that is neither slow nor a benchmark
	$(PYTEST) -n 2 -m 'not slow and not bench'

test-all: $(INSTALLED) ## the gate and the slow tests: full compile audit, kill tests, README commands
	$(PYTEST) -n 2 -m 'not bench'

fuzz: $(INSTALLED) ## the tests that draw their inputs, with fresh seeds; a failure names the seed that repeats it
	FASTPO_SEED=random $(PYTEST) -n 2 -m 'not slow and not bench' tests/ops tests/kernels tests/losses tests/margins tests/noise tests/head tests/trainer

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) ## time, memory and accuracy beside the other libraries in 10 minutes (the first run trains its states too), and a report
	$(BIN)/fastpo bench --out runs/bench.json
	$(BIN)/fastpo bench --report runs/bench.json

bench-suites: $(INSTALLED) ## the pytest-benchmark suites: time of single operations on small shapes
	$(BIN)/python -m pytest benchmarks/suites -m bench

audit: $(INSTALLED) ## compile every kernel configuration for sm_80, sm_90 and sm_100 and print its resources
	$(BIN)/python -m fastpo.kernels.audit

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info artefacts runs .pytest_cache .mypy_cache .ruff_cache
