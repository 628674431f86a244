PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: bench test verify lint clean

$(STAMP): pyproject.toml constraints.txt peers.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench,peers,dev]"
	$(BIN)/pip install --quiet --no-deps --requirement peers.txt
	touch $@

bench: $(STAMP)
	$(BIN)/recattn bench --quick --data movielens --output results
	$(BIN)/recattn profile --quick --data movielens --output results

test: $(STAMP)
	$(BIN)/python -m pytest -n auto -m "not slow"

verify: $(STAMP)
	$(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist results *.egg-info
