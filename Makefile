# make demo     see the leak and its cures (about 10 minutes on 4 cores, about 15 on 2; after the first install)
# make test     ruff, mypy and all tests (about 23 minutes on 2 cores)
# Both make .venv and install requirements.lock into it when something is missing; a second call starts at once.

# The first of these that runs and is new enough; choose another with `make PYTHON=/path/to/python3.12 test`.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PY := .venv/bin/python
STAMP := .venv/.installed
PIP := $(PY) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint install clean FORCE

help:
	@echo "make demo     train the leaky run and its cures on small data, compare them, say where the report is"
	@echo "make test     ruff, mypy and all tests"
	@echo "make lint     ruff and mypy only"
	@echo "make install  only .venv, with everything in it"
	@echo "make clean    remove caches and builds; .venv, datasets/ and output/ stay"

demo: $(STAMP)
	$(PY) tools/demo.py $(ARGS)

# All that can runs side by side, then the rest one by one; with ARGS only what they name.
test: lint
ifeq ($(strip $(ARGS)),)
	@$(PY) -m pytest -m "not alone" --numprocesses=2 --dist=loadfile --no-loadscope-reorder; first=$$?; \
		$(PY) -m pytest -m alone && exit $$first
else
	$(PY) -m pytest $(ARGS)
endif

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

install: $(STAMP)

# The stamp holds the folder it was installed for: a copied or moved checkout installs itself again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): requirements.lock setup.py
	@test -n "$(PYTHON)" || { \
		echo "leakfree needs Python 3.11 or newer, and found none; found: $$(python3 --version 2>&1)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
		|| "$(PYTHON)" -m venv --clear .venv \
		|| { echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "Installing requirements.lock into .venv: once, some minutes."
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $(STAMP)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find leakfree tests tools projects -name __pycache__ -type d -prune -exec rm -rf {} +
