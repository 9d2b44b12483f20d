# `make demo` and `make test` work on a bare Linux machine: both create .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
DEMO_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2

help:
	@echo "make demo    generate emoji three ways (eager, Inductor, toprovar) and compare; DEMO_ARGS='--count 4'"
	@echo "make test    run the test suite in two processes; PYTEST_ARGS='-k plan', JOBS=0 for one"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measure the table of the README again (about an hour on two CPU cores)"
	@echo "make clean   remove the environment and what the tools cached"

demo: $(STAMP)
	$(BIN)/toprovar demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/toprovar_compile  # the packages laid out as they are installed
	find toprovar_compile passes kernels -name '*.py' -exec cp --parents {} build/types \;
	touch build/types/toprovar_compile/py.typed
	mv build/types/passes build/types/kernels build/types/toprovar_compile
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

bench: $(STAMP)
	$(BIN)/python benchmarks/emoji_var.py --update-readme

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info

$(STAMP): pyproject.toml constraints.txt scripts/setup_env.sh
	@bash scripts/setup_env.sh $(VENV)
	@touch $@
