# Two commands: `make quickstart` and `make test`. Both make their own .venv from requirements.lock.
# `make test-fast` leaves out the tests marked slow. `make docs` builds the documentation into site/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two processes of one thread each: more threads would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart check pytest test test-fast docs clean

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Poise needs Python 3.11 or newer; set PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/poise quickstart

check: $(VENV)/installed
	$(BIN)/ruff format --check src tests benchmarks experiments docs
	$(BIN)/ruff check src tests benchmarks experiments docs
	$(BIN)/mypy

pytest: $(VENV)/installed
	$(PYTEST) $(SELECT)

# mypy without a cache takes about a minute of one core: it runs beside the tests, so that no core waits for it.
test: $(VENV)/installed
	$(MAKE) -j2 check pytest

test-fast: $(VENV)/installed
	$(MAKE) -j2 check pytest SELECT='-m "not slow"'

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info
