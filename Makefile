# `make test` and `make demo` work on a machine with only Python (3.11 to 3.13) and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint clean

demo: $(STAMP)
	$(BIN)/python examples/wine.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

# The stamp is older than pyproject.toml whenever the requirements changed: install again.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) out
