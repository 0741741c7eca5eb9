# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-all setup lint type format clean
.SECONDARY:

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The demo trains every merger on the same shards, prior and steps; what is finished is not run again.
MERGERS ?= QuickMerge NoMerge UniformPool RandomPrune TopKPrune ToMe
STEPS ?= 600
BACKBONE_STEPS ?= 600
EXPERIMENT := --config configs/experiment/image.yaml --logger.wandb true
RUNS := $(MERGERS:%=runs/demo/%/results.json)

demo: setup $(RUNS)
	$(BIN)/python train.py report runs/demo --out report

data/image/test/index.json: | setup
	$(BIN)/python -m datamodules prepare image --source digits --out data/image

pretrained/image/config.json: data/image/test/index.json
	$(BIN)/python train.py fit --config configs/experiment/backbone_image.yaml --run_dir runs/backbone_image \
		--fresh true --trainer.max_steps $(BACKBONE_STEPS)

runs/demo/%/results.json: pretrained/image/config.json
	$(BIN)/python train.py fit $(EXPERIMENT) --run_dir runs/demo/$* --fresh true --trainer.max_steps $(STEPS) \
		--model.merger $* $(call budget,$*)
	$(BIN)/python train.py test $(EXPERIMENT) --run_dir runs/demo/$* --model.merger $* $(call budget,$*)

# QuickMerge has a budget of its own; the rivals keep a fixed number of tokens; NoMerge keeps all.
budget = $(if $(filter QuickMerge NoMerge,$(1)),,--model.merger.budget.class_path qm_lightning.merging.FixedBudget)

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

clean:
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis
