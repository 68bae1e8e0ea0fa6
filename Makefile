# `make` alone lists what there is. The environment is made on first use, in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Without a GPU, PyTorch's own index has builds of a tenth of the size: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "torch>=2.11"
	$(BIN)/pip install --quiet --editable ".[demo]" --group dev
	touch $@

setup: .venv/.ready ## make the environment

demo: .venv/.ready ## retrieve, prune and answer real questions, then write a page to look at
	$(BIN)/prunekit demo

test: .venv/.ready lint ## every check, then the tests (CPU, offline)
	$(BIN)/python -m pytest

test-slow: .venv/.ready ## the tests that load real models
	$(BIN)/python -m pytest -m slow

lint: .venv/.ready ## style, import rules, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: .venv/.ready ## measure quality and cost; writes benchmarks/*/results
	$(BIN)/python benchmarks/context/cost.py
	$(BIN)/python benchmarks/context/demo_questions.py

clean: ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
