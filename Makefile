# make setup | demo | test | test-slow | lint | format | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Public graphs for the tests that want real data; without the folder those tests skip and say so.
ifndef DNGD_DATA_ROOT
ifneq ($(wildcard ../shared/data),)
export DNGD_DATA_ROOT := $(abspath ../shared/data)
endif
endif

.PHONY: setup demo test test-slow lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else "dngd needs Python 3.10 to 3.12, this is %d.%d; run make with PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench,ogb]'
	@touch $(STAMP)
	@echo 'dngd is installed in $(VENV); in a shell: . $(BIN)/activate'

demo: setup
	$(BIN)/dngd train --config examples/products_mini.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Files two at a time; then those that want the Ray cluster, of which one is enough for two cores.
test: lint
	$(BIN)/python -m pytest -m 'not slow and not gpu and not ray' -n 2 --dist loadfile
	$(BIN)/python -m pytest -m 'ray and not slow and not gpu'

test-slow: setup
	$(BIN)/python -m pytest -m 'slow and not gpu'

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
