# Two commands: `make quickstart` and `make test`. Both make their own .venv from requirements.lock.
# `make test-fast` leaves out the tests marked slow. `make docs` builds the documentation into site/.
# `make coverage` lists the lines and branches of src/poise that the fast tests never take.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two processes of one thread each: more threads would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart check test test-fast coverage docs clean

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

test: check
	$(PYTEST)

test-fast: check
	$(PYTEST) -m "not slow"

coverage: $(VENV)/installed
	$(BIN)/python -m coverage erase
	$(subst -m pytest,-m coverage run -m pytest,$(PYTEST)) -m "not slow"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info
