PYTHON ?= python3
# Another Triton than constraints.txt has, in an environment of its own: make verify TRITON=3.6.0
# The interpreter of 3.6 fails with NumPy 2.4.
TRITON :=
VENV := .venv$(if $(TRITON),-triton-$(TRITON))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: bench test verify lint docs clean

$(STAMP): pyproject.toml constraints.txt peers.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench,peers,docs,dev]"
	$(BIN)/pip install --quiet --no-deps --requirement peers.txt
	$(if $(TRITON),$(BIN)/pip install --quiet triton==$(TRITON) "numpy<2.4")
	touch $@

bench: $(STAMP)
	$(BIN)/recattn bench --quick --data movielens --output results
	$(BIN)/recattn profile --quick --data movielens --output results

test: $(STAMP)
	$(BIN)/python -m pytest -n auto -m "not slow"

verify: $(STAMP)
	$(BIN)/python -m pytest -n auto --hypothesis-profile=verify

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/mkdocs build

clean:
	rm -rf .venv .venv-triton-* build dist results site *.egg-info
