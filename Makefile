# Each target makes its own environment, in .venv, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The Python that has soma.aims, for test-aims.
AIMS_PYTHON ?= python3
AIMS_VENV := .venv-aims
WHERE := import sysconfig; print(sysconfig.get_path('purelib'))

.PHONY: test test-aims stress mutants lint demo bench clean

test: lint
	$(BIN)/python -m pytest

test-aims: $(AIMS_VENV)/dev
	$(AIMS_VENV)/bin/python -m pytest --aims real -m aims

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
	$(BIN)/python -m benchmarks.resample
	$(BIN)/python -m benchmarks.threads

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	touch $@

$(AIMS_VENV)/dev: pyproject.toml
	$(AIMS_PYTHON) -m venv $(AIMS_VENV)
	$(AIMS_PYTHON) -c "$(WHERE)" > $$($(AIMS_VENV)/bin/python -c "$(WHERE)")/aims.pth
	$(AIMS_VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(AIMS_VENV)/bin/python -m pip install --quiet --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) $(AIMS_VENV) demo-output build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
