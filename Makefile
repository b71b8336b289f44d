# On a fresh machine `make demo` and `make test` are all that is needed: both make .venv first.
VENV ?= .venv
PYTHON_IN_VENV := $(VENV)/bin/python
NATIVE_SOURCES = $(shell find csrc ptx tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# More arguments for the commands, as in: make demo DEMO_FLAGS="--steps 50"
CHECK_FLAGS ?= --quick
DEMO_FLAGS ?=
TEST_FLAGS ?= -n 2
BENCH_FLAGS ?=
GATES_FLAGS ?=
MUTATE_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help bootstrap demo test sweep test-install bench gates mutate lint format clean
MAKEFLAGS += --no-print-directory

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do \
	  printf '  make %-14s %s\n' "$$name" "$$text"; done

bootstrap: ## make or refresh .venv; nothing where nothing changed
	@VENV=$(VENV) ./bootstrap.sh

demo: bootstrap ## check the kernels, then train a GPT with and without them
	@$(PYTHON_IN_VENV) -m kernels check $(CHECK_FLAGS)
	@$(PYTHON_IN_VENV) -m kernels demo $(DEMO_FLAGS)

test: bootstrap ## all tests but the slow ones
	@$(PYTHON_IN_VENV) -m pytest tests --benchmark-disable $(TEST_FLAGS)

sweep: bootstrap ## GPU kernels on the executor: every case, architecture and schedule; long
	@$(PYTHON_IN_VENV) -m pytest tests -m sweep --benchmark-disable $(TEST_FLAGS)

test-install: bootstrap ## the slow tests: installs into fresh environments, needs a package index
	@$(PYTHON_IN_VENV) -m pytest tests -m slow --benchmark-disable

bench: bootstrap ## time every kernel beside PyTorch's own
	@$(PYTHON_IN_VENV) -m pytest bench --benchmark-only $(BENCH_FLAGS)

gates: bootstrap ## machine code and traffic of every GPU kernel against bench/gates.json
	@$(PYTHON_IN_VENV) -m bench gates $(GATES_FLAGS)

mutate: bootstrap ## does the test-suite notice when an instruction of a GPU kernel is changed?
	@$(PYTHON_IN_VENV) -m ptx.mutate $(MUTATE_FLAGS)

lint: bootstrap ## ruff, mypy, clang-format, codespell
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy
	@$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	@$(PYTHON_IN_VENV) -m codespell_lib

format: bootstrap ## rewrite the sources as ruff and clang-format want them
	@$(VENV)/bin/ruff check --fix-only .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(NATIVE_SOURCES)

clean: ## remove builds and caches; .venv stays
	@rm -rf build dist *.egg-info kernels/*.so kernels/_build_info.json
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
