# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: demo demo-all test test-all setup lint type format bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo image text

demo-all: setup
	$(BIN)/python -m benchmarks.demo image text video paired mixture

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/mypy

test: lint type
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: lint type
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks all

clean:
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis
