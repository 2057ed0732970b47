# Every target builds what it needs in .venv; Python 3.11 or later and make are all that it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
RUNTIME := $(VENV)/runtime.stamp
BENCH := $(VENV)/bench.stamp
DEVELOPMENT := $(VENV)/development.stamp

DEMO := demo/run.py
BENCHMARKS := benchmarks/import.py benchmarks/consume.py benchmarks/bodies.py \
    benchmarks/concurrency.py benchmarks/growth.py benchmarks/lmtp.py benchmarks/mailq.py \
    benchmarks/readiness.py
DOCS := build/docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types docs torture bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST))

demo: $(RUNTIME) ## import, route and consume a few dozen messages in a scratch folder
	@$(BIN)/python $(DEMO)

test: $(DEVELOPMENT) ## run the tests and measure their coverage
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term

lint: $(DEVELOPMENT) ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEVELOPMENT) ## check the types
	$(BIN)/mypy

docs: $(DEVELOPMENT) ## build the documents and run their examples
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs $(DOCS)/html
	$(BIN)/sphinx-build -W --keep-going -n -q -b doctest docs $(DOCS)/doctest

torture: $(DEVELOPMENT) ## run the tests that take long: sweeps of kills, soaks
	$(BIN)/python -m pytest -m torture

bench: $(BENCH) ## measure importing, consuming, LMTP and Postfix's queue
	set -e; for script in $(BENCHMARKS); do $(BIN)/python $$script; done

clean: ## remove the environment and everything built or cached
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* \
	    .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian keeps ensurepip in python3-venv; where it is absent, the interpreter's own pip will do.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is not Python 3.11 or later; name another one: make PYTHON=..." >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	    $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -c 'import pip' 2>/dev/null; then \
	    $(PYTHON) -m venv --without-pip $(VENV) && \
	    $(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python install --quiet pip; \
	else \
	    echo "$(PYTHON) has neither ensurepip nor pip: apt-get install python3-venv" >&2; exit 1; \
	fi || { rm -rf $(VENV); exit 1; }

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(BENCH): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[bench]'
	@touch $(RUNTIME) $@

$(DEVELOPMENT): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $(RUNTIME) $@
