# Each target makes its own environment, in .venv, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test stress mutants lint demo bench clean

test: lint
	$(BIN)/python -m pytest

stress: $(VENV)/dev
	$(BIN)/python -m pytest tests/test_storm.py tests/test_storm_public.py \
		--storm-seconds 60 --timeout 600

mutants: $(VENV)/dev
	$(BIN)/python tests/mutants/run.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(VENV)/dev
	$(BIN)/python -m benchmarks.demo

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.read_speed
	$(BIN)/python -m benchmarks.hit_cost
	$(BIN)/python -m benchmarks.mean
	$(BIN)/python -m benchmarks.median
	$(BIN)/python -m benchmarks.plans
	$(BIN)/python -m benchmarks.passes
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.threads

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
