# SPDX-License-Identifier: Apache-2.0
#
#   make demo    prewarm the bundled kernel library for four architectures (no GPU needed)
#   make test    lint, docs, then the whole test suite
#   make servers install what the tests of tiers start, where that is allowed; a part of "make test"
#   make lint    ruff, mypy --strict, import-linter
#   make docs    build the documentation into build/docs; a warning is an error
#   make bench   this cache beside cuda.core's, with ratios
#   make clean   remove what builds and tools left; environments go with "make distclean"
#
# PYTHON chooses the interpreter (3.11 or later). The default one gets .venv; PYTHON=python3.12 gets .venv-3.12.
# ARGS is handed on: make test ARGS="-k store", make bench ARGS="--only get".

PYTHON ?= python3
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)
endif
BIN := $(VENV)/bin

.PHONY: help demo test lint docs bench servers bytecode clean distclean environment

help:
	@sed -n 's/^#   make/make/p' Makefile

# Quick when nothing changed: one interpreter start that compares a stamp.
environment:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing); \
	  echo "cuda_progcache needs Python 3.11 or later, and $(PYTHON) is $$found." \
	       "Choose another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -I ci/environment.py $(VENV)

demo: environment
	@$(BIN)/cuda-progcache demo $(ARGS)

# Processes: two per CPU, since many tests wait; the tests of a file stay together, and share what its
# fixtures make; in the order of the folders, since files of few long tests would else come last, and alone.
test: export PYTEST_XDIST_AUTO_NUM_WORKERS ?= $(shell expr 2 '*' $$(getconf _NPROCESSORS_ONLN))
test: environment
	@$(MAKE) -j2 --output-sync=target servers lint docs bytecode
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: environment
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@said=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$said"; exit 1; }
	@echo 'lint: ruff, mypy --strict and import-linter found nothing'

# Once for all: each worker would rewrite the assertions of every test, and each process of a test compile the
# package, the more so where PYTHONDONTWRITEBYTECODE is set. What can't be collected, the run of the tests says.
bytecode: environment
	@$(BIN)/python -m compileall -q cuda_progcache ci
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --collect-only -qq > /dev/null 2>&1 || true

servers:
	@ci/servers/install.sh

docs: environment
	@$(BIN)/python -m sphinx -q -W --keep-going -j auto -b html ci/docs build/docs && echo 'docs: build/docs/index.html'

# The peers of the memo's rows are wanted here alone; without them these rows say so.
bench: environment
	@$(BIN)/python -c 'import diskcache, fleche, joblib' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[bench]' || true
	@$(BIN)/python -m ci.bench $(ARGS)

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis ci/bench/results
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv .venv-*
