# Two commands: `make quickstart` and `make test`. Both make their own .venv from requirements.lock.
# `make test-fast` runs the tests that are not marked slow, without the lint of `make check`. `make test-engines` runs
# tests/engines, each with its own packages in .engines/, which are kept. `make docs` builds the documentation into site/.
# `make coverage` lists the lines and branches of src/poise that the fast tests never take.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two processes of one thread each: more threads would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart check pytest test test-fast test-engines coverage docs clean

ENGINES := $(patsubst tests/engines/%/requirements.txt,%,$(wildcard tests/engines/*/requirements.txt))

$(VENV)/installed: requirements.lock requirements-torch.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Poise needs Python 3.11 or newer; set PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.lock
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
	$(PYTEST) -m "not slow"

coverage: $(VENV)/installed
	$(BIN)/python -m coverage erase
	$(subst -m pytest,-m coverage run -m pytest,$(PYTEST)) -m "not slow"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

test-engines: $(ENGINES:%=test-engine-%)

test-engine-%: .engines/%/installed
	POISE_ENGINES=1 ENGINE_RESULT=$(CURDIR)/.engines/$*/result.json OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 \
		.engines/$*/bin/python -m pytest -W default tests/engines/$*

# An engine's own packages come before those of .venv, which it finds through a .pth file. The engines themselves pin
# what conflicts with it, or packages that need a GPU: without-dependencies.txt names them.
.PRECIOUS: .engines/%/installed
.SECONDEXPANSION:
.engines/%/installed: tests/engines/%/requirements.txt $$(wildcard tests/engines/$$*/without-dependencies.txt) \
		$(VENV)/installed
	$(BIN)/python -m venv .engines/$*
	SITE='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$SITE")')" \
		> "$$(.engines/$*/bin/python -c "$$SITE")/zz_poise.pth"
	.engines/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	if [ -e tests/engines/$*/without-dependencies.txt ]; then .engines/$*/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-deps -r tests/engines/$*/without-dependencies.txt; fi
	touch $@

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .engines build dist site *.egg-info
