# `make demo` and `make test` work on a fresh clone: they install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install clean

demo: .venv/installed
	$(BIN)/quant-experts demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt src/quant_experts.pth
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval,report]'
	touch $@

clean:
	rm -rf .venv demo-output
