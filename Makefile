# Every target makes and reuses .venv, with a Python that suits; PYTHON=/path/to/python chooses another.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench aot clean
SHELL := /bin/bash
BIN := .venv/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

help:
	@echo 'make demo      the whole path on 2 cores in about 12 minutes: corpus, tokenizer, dataset, model, report'
	@echo 'make test      the tests, without the slow ones'
	@echo 'make test-all  all the tests'
	@echo 'make lint      ruff and mypy'
	@echo 'make bench     measurements against other libraries, as JSON lines'
	@echo 'make aot       attention kernels compiled for GPUs and TPUs that need not be here, as a table'
	@echo 'make clean     remove the environments and all caches; runs/ stays'
	@echo 'PYTHON=/path/to/python chooses the interpreter (3.11 or newer).'

demo: .venv/.data
	$(BIN)/python -m experiments.demo

# A file's tests stay with one worker, so that what it compiles and trains for them is made once.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.dev
	$(PYTEST) -m "not slow"

test-all: .venv/.dev
	$(PYTEST)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch and Tunix pin versions of their own, so they get an environment of their own. Attention's are not for a CPU.
bench: .venv-bench/.bench
	@set -e; for file in $(filter-out %attention_aot.py %attention_device.py %tune_attention.py,$(wildcard benchmarks/[!_]*.py)); do \
		echo ".venv-bench/bin/python -m benchmarks.$$(basename $$file .py)" >&2; \
		.venv-bench/bin/python -m benchmarks.$$(basename $$file .py); \
	done

# The compilers for GPUs and TPUs, for a machine that has neither.
aot: .venv-aot/.aot
	.venv-aot/bin/python -m benchmarks.attention_aot

clean:
	rm -rf .venv .venv-bench .venv-aot .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed in an environment follows setup.cfg: ENVIRONMENT/.EXTRA is touched when the extra is in place.
.venv/.% .venv-bench/.% .venv-aot/.%: setup.cfg pyproject.toml
	@bash .ci/install "$(@D)" "$*"
	@touch $@
