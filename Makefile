# Everything runs in .venv, made from constraints.txt by `make install`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install quickstart test test-all drill lint format docs tasks parity bench-train bench-layouts bench-attention bench-startup bench-data bench-reading bench-export bench-checkpoint bench-recovery bench-watching bench-generation bench-plan clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

install: $(INSTALLED)  ## make .venv with the pinned dependencies

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("broadgauge needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## raw text to a trained, exported model, in minutes
	$(BIN)/broadgauge run configs/quickstart.yaml

test: $(INSTALLED)  ## every test but the slow drills
	$(BIN)/python -m pytest

test-all: $(INSTALLED)  ## the slow drills too
	$(BIN)/python -m pytest -m ''

drill: $(INSTALLED)  ## kill parts of a job at DRILL_KILLS=50 moments of DRILL_SEED=0; what was killed, and how long it cost
	$(BIN)/python -m pytest -q -s -m slow tests/integration/test_drills.py

lint: $(INSTALLED)  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)     ## rewrite the pages, rules and dashboards that are made from the code
	PYTHONPATH=. $(BIN)/python docs/configuration.py
	PYTHONPATH=. $(BIN)/python docs/costs.py
	PYTHONPATH=. $(BIN)/python docs/events.py
	PYTHONPATH=. $(BIN)/python docs/metrics.py
	PYTHONPATH=tests:. $(BIN)/python -W ignore docs/layouts.py
	PYTHONPATH=. $(BIN)/python k8s/monitoring/prometheus_rule.py
	PYTHONPATH=. $(BIN)/python k8s/monitoring/dashboard.py

tasks: $(INSTALLED)    ## make the tasks that are shipped once more
	PYTHONPATH=. $(BIN)/python -m launcher.evaluation.making

parity: $(INSTALLED)  ## every layout against one process: the whole table
	PYTHONPATH=tests:. $(BIN)/python -W ignore tests/parity.py

bench-train: $(INSTALLED)  ## training speed beside other loops
	$(BIN)/python -W ignore -m benchmarks.train

bench-layouts: $(INSTALLED)  ## two ranks in every layout beside one process
	KINETO_LOG_LEVEL=5 $(BIN)/python -W ignore -m benchmarks.layouts

bench-recovery: $(INSTALLED)  ## kill ranks and agents: time to the next step
	PYTHONPATH=tests:. $(BIN)/python -W ignore -m benchmarks.recovery

bench-watching: $(INSTALLED)  ## what it costs a run to be watched
	PYTHONPATH=tests:. $(BIN)/python -W ignore -m benchmarks.watching

bench-generation: $(INSTALLED)  ## generation beside transformers
	$(BIN)/python -W ignore -m benchmarks.generation

bench-plan: $(INSTALLED)  ## small runs beside what the planner says of them
	PYTHONPATH=tests:. $(BIN)/python -W ignore -m benchmarks.planner

bench-attention: $(INSTALLED)  ## banded against dense attention; memory of long sequences
	$(BIN)/python -W ignore -m benchmarks.attention

bench-startup: $(INSTALLED)  ## time from the command to the first completed step
	$(BIN)/python -m benchmarks.startup

bench-data: $(INSTALLED)  ## the data pipeline beside other tools, on 110 MB of real text
	$(BIN)/python -W ignore -m benchmarks.data

bench-reading: $(INSTALLED)  ## reading training samples beside megatron-core's data sets
	$(BIN)/python -W ignore -m benchmarks.reading

bench-checkpoint: $(INSTALLED)  ## stall of saving, speed of writing and loading, beside dd and DCP
	KINETO_LOG_LEVEL=5 $(BIN)/python -W ignore -m benchmarks.checkpoint

bench-export: $(INSTALLED)  ## memory and time of exporting a 1.3B model to Hugging Face, and of importing it
	$(BIN)/python -W ignore -m benchmarks.export

clean:           ## remove caches; runs and .venv stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
