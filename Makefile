# Everything runs in .venv, which the first command sets up. It needs nothing but make and Python 3.11 or newer.

# The python to start from: `make PYTHON=/path/to/python3.12 test` to choose it.
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3 python,$(shell command -v $(p) >/dev/null 2>&1 && $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.anywidth-installed
# Two test processes: JAX uses the other cores by itself.
WORKERS ?= 2
SIZE ?=

.PHONY: help test quick long figure1 figure3 bench docs lint format clean

help:
	@echo "make test      run the tests"
	@echo "make quick     run the tests that are not slow"
	@echo "make long      run the tests that make test leaves out"
	@echo "make figure1   draw Figure 1 of Tensor Programs II (SIZE='--max-width 8192 --seeds 100' for the full one)"
	@echo "make figure3   draw Figure 3 of Tensor Programs I (SIZE as for figure1)"
	@echo "make bench     run the benchmarks"
	@echo "make docs      build the site (LINKS=1 checks links that leave it)"
	@echo "make lint      check style and types"
	@echo "make format    put style right"
	@echo "make clean     remove caches and outputs (not .venv)"

$(STAMP): pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
		if [ -z "$(PYTHON)" ]; then echo "anywidth needs Python 3.11 or newer, and none was found: make PYTHON=/path/to/python" >&2; exit 1; fi; \
		echo "setting up $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]' --group dev
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

quick: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow and not long'

long: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m long

figure1: $(STAMP)
	$(BIN)/anywidth figure1 $(SIZE)

figure3: $(STAMP)
	$(BIN)/anywidth figure3 $(SIZE)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -n 0 -q -s

DOCS_STAMP := $(VENV)/.anywidth-docs-installed
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# The notebooks are run; warnings are errors. Links within the site are checked always, those that leave it with LINKS=1.
docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html
	@if [ -n "$(LINKS)" ]; then $(BIN)/python -m sphinx -W -b linkcheck docs docs/_build/links; fi
	@echo "the site: docs/_build/html/index.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf docs/_build docs/jupyter_execute .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist figure1 figure3
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
