# kvtier. `make demo` and `make test` set up all they need inside the checkout (.venv*, .cache), once.
# They need Python 3.11 or newer, make and a C++ compiler. Settings: docs/how-to/install.md.

PYTHON ?= python3
SETUP = $(PYTHON) scripts/bootstrap.py
MODEL = $(CURDIR)/.cache/smollm2

# A command line `make demo ARGS="--rounds 2"` hands on arguments.
ARGS ?=

# Libraries that the machine lacks and the set-up has fetched (scripts/system_libraries.py).
export LD_LIBRARY_PATH := $(if $(LD_LIBRARY_PATH),$(LD_LIBRARY_PATH):)$(CURDIR)/.cache/system-libraries

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-engine gpu-check lint format bench docs setup clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

demo: ## answer questions over long documents in the real vLLM, with and without kvtier
	@$(SETUP) engine model
	@.venv-vllm/bin/python examples/multi_round_qa.py --model $(MODEL) $(ARGS)

test: ## lint, types, unit tests, then the tests in the real engine, in both versions of it
	@$(SETUP) dev engine model engine-old
	@$(PYTHON) scripts/run_tests.py lint unit engine engine-old

test-unit: ## unit tests only
	@$(SETUP) dev
	@$(PYTHON) scripts/run_tests.py unit

test-engine: ## tests in the real engine only
	@$(SETUP) engine model engine-old
	@$(PYTHON) scripts/run_tests.py engine engine-old

gpu-check: ## tests and benchmarks on a GPU (needs Python with CuPy, numpy, pytest, pytest-timeout, hypothesis; builds nothing)
	@$(PYTHON) scripts/gpu_check.py $(ARGS)

lint: ## ruff and mypy
	@$(SETUP) dev
	@$(PYTHON) scripts/run_tests.py lint

format: ## bring the sources into shape
	@$(SETUP) dev
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

bench: ## kvtier's benchmarks that need no engine (ARGS="--help" lists them)
	@$(SETUP) dev
	@.venv/bin/kvtier bench $(or $(ARGS),control)

docs: ## make the generated reference pages anew
	@$(SETUP) dev
	@.venv/bin/python scripts/generate_reference.py

setup: ## every environment and the model, without running anything
	@$(SETUP) dev engine model engine-old

clean: ## remove what was built, keep the environments and the model
	@rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache/demo
	@find kvtier scripts tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove everything that make made; the next run sets up anew
	@rm -rf .venv .venv-vllm .venv-vllm-0.27 .cache kvtier/*.so
