# `make help` lists what can be done. Each target installs what it needs into .venv, once, and again when
# pyproject.toml or constraints.txt change. Options: MODEL=name-or-directory, ARGS="...", PYTHON=python3.12.
# On a Linux machine without an NVIDIA GPU, PyTorch's CPU build saves several gigabytes:
#   make audit PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
MODEL ?= tiny-olmoe
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable
# Torch's own switch: large pages (Linux) for tensors from 2 MB on, which spares most page faults of large products.
export THP_MEM_ALLOC_ENABLE ?= 1
SOURCES := $(wildcard hooked_moe weights_conversion experiments benchmarks tests docs)

.DEFAULT_GOAL := help
.PHONY: help audit paper test test-all check format docs bench calibrate fuzz gpu clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

audit: $(VENV)/.runtime ## remove every expert at every token of MODEL (tiny-olmoe) and report; ARGS="--help" lists options
	@$(BIN)/hooked-moe audit --model $(MODEL) $(ARGS)

paper: $(VENV)/.runtime ## every experiment of the paper, as defined and as released, on the shipped models; ARGS="--models olmoe"
	@$(BIN)/hooked-moe paper $(ARGS)

# Workers take neighbouring tests, which share fixtures, and what another has left once they are done.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(VENV)/.development ## run the tests, but for the slow ones; ARGS="-m slow", ARGS="-k masks"
	@$(PYTEST) $(ARGS)

test-all: $(VENV)/.development ## run every test, the slow ones too
	@$(PYTEST) -m "" $(ARGS)

check: $(VENV)/.development ## formatter, linter, type checker, and what may import what
	@status=0; \
	$(BIN)/python -m ruff format --check $(SOURCES) || status=1; \
	$(BIN)/python -m ruff check $(SOURCES) || status=1; \
	$(BIN)/python -m mypy || status=1; \
	$(BIN)/lint-imports --no-logo --no-cache || status=1; \
	exit $$status

format: $(VENV)/.development ## format the sources and apply the linter's safe fixes
	@$(BIN)/python -m ruff format $(SOURCES)
	@$(BIN)/python -m ruff check --fix $(SOURCES)

docs: $(VENV)/.docs ## build the documentation's site, warnings as errors: open build/site/index.html
	@PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "The site is in build/site: open build/site/index.html"

bench: $(VENV)/.development ## measure speed and memory against named peers, into benchmarks/RESULTS.md; ARGS=--small is a trial
	@$(BIN)/python -m benchmarks.all $(ARGS)

calibrate: $(VENV)/.development ## how often every decision rule errs, into benchmarks/CALIBRATION.md; ARGS=--small is a trial
	@$(BIN)/python -m benchmarks.calibration $(ARGS)

fuzz: $(VENV)/.development ## damaged and hostile files and options, outcomes counted in benchmarks/FUZZ.md; ARGS="--inputs 100000"
	@$(BIN)/python -m tests.fuzz $(ARGS)

gpu: $(VENV)/.development ## on an NVIDIA GPU: its tests, compute-sanitizer, and speed into benchmarks/GPU.md; ARGS=--small is a trial
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## delete .venv and caches; results/ stays
	@rm -rf $(VENV) *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache build
	@find . -name __pycache__ -prune -exec rm -rf {} +

# The stamps are written last, so an installation that was interrupted is taken up again.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: hooked_moe needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing hooked_moe and its packages into $(VENV) (PyTorch is large: this can take minutes) ..."
	@$(INSTALL) .
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	@echo "Installing what tests and checks need into $(VENV) ..."
	@$(INSTALL) '.[test,dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	@echo "Installing what builds the documentation into $(VENV) ..."
	@$(INSTALL) '.[docs]'
	@touch $@
