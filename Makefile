# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: demo demo-all test test-all setup lint type format clean
.SECONDARY:

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The demo trains every merger on the same shards, prior and steps; what is finished is not run again.
# Two cells train at a time; costs are measured afterwards, one cell at a time.
# Shorter, e.g.: make demo STEPS=50 BACKBONE='--trainer.max_steps 100'
MERGERS ?= QuickMerge,NoMerge,UniformPool,RandomPrune,TopKPrune,ToMe
COMPRESSIONS ?= 2.37
SEEDS ?= 1
STEPS ?= 400
STEPS_text ?= 100
# Validation costs time and changes nothing in the table, which comes from the test split and the last weights: every so many steps, on 16 batches.
VAL ?= 200
VAL_text ?= 100
JOBS ?= 2
BACKBONE ?=

demo: setup demo-image demo-text
	$(BIN)/python train.py report runs/demo --out report

demo-%: pretrained/%/config.json
	$(BIN)/python train.py compare --config configs/experiment/$*.yaml --out runs/demo/$* --mergers "$(MERGERS)" \
		--compressions $(COMPRESSIONS) --seeds $(SEEDS) --jobs $(JOBS) \
		--trainer.max_steps $(or $(STEPS_$*),$(STEPS)) --trainer.val_check_interval $(or $(VAL_$*),$(VAL)) \
		--trainer.limit_val_batches 16

pretrained/%/config.json: data/%/test/index.json
	$(BIN)/python train.py fit --config configs/experiment/backbone_$*.yaml --run_dir runs/backbone_$* --fresh true $(BACKBONE)

data/%/test/index.json: | setup
	$(BIN)/python -m datamodules prepare $(if $(findstring text,$*),text,$*) --out data/$* $(SOURCE_$*)

SOURCE_image := --source digits --workers 2
SOURCE_video := --source digits --workers 2
SOURCE_paired := --source digits --workers 2
SOURCE_text := --source stdlib --workers 2
SOURCE_text_streaming := --source stdlib --task passage --workers 2

# Every other shipped experiment for real, each with its report; what is finished is not run again.
EXPERIMENTS ?= video paired nxtp text_streaming text_minilm mixture
SHORTER ?= # e.g. make demo-all STEPS=50 SHORTER='--trainer.max_steps 100' BACKBONE='--trainer.max_steps 100'

demo-all: demo $(EXPERIMENTS:%=report/%/index.html)
	@echo "reports: report/index.html $(EXPERIMENTS:%=report/%/index.html)"

report/video/index.html: pretrained/video/config.json
report/paired/index.html: pretrained/image/config.json data/paired/test/index.json
report/nxtp/index.html: pretrained/image/config.json
report/text_streaming/index.html: pretrained/text_streaming/config.json
report/text_minilm/index.html: data/text/test/index.json
report/mixture/index.html: data/paired/test/index.json
report/mixture/index.html: pretrained/image/config.json pretrained/video/config.json pretrained/text/config.json

$(EXPERIMENTS:%=report/%/index.html): report/%/index.html:
	$(BIN)/python train.py fit --config configs/experiment/$*.yaml --run_dir runs/all/$* --fresh true $(SHORTER)
	$(BIN)/python train.py test --config configs/experiment/$*.yaml --run_dir runs/all/$*
	$(BIN)/python train.py report runs/all/$* --out report/$*

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
