# The one definition of every check. `make demo` and `make test` need only Python >= 3.10, a C++ compiler, git and make.

# The first Python that is new enough; `make PYTHON=...` chooses another.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
  $(p) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(p))))
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test files side by side: most tests keep one core busy. `make test JOBS=0` runs them one after the other.
JOBS   ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-thorough test-fast test-mlx test-native test-metal bench-metal lint types tables docs \
	patches-check patches-refresh check wheel clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install ggufrq with all that demo and tests need

$(STAMP): pyproject.toml ggufrq/__init__.py
	@test -n "$(PYTHON)" || \
	  { echo "error: no Python 3.10 or newer was found"; echo "  try: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments"; echo "  try: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV); the first time takes a minute or two"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[convert,dev]'
	@touch $@

demo: $(STAMP) ## build, quantize the embedded models, and measure every cache type on them
	$(BIN)/ggufrq demo

test: $(STAMP) ## all tests; the first run builds llama.cpp
	$(BIN)/ggufrq build --tests
	$(PYTEST) -m "not thorough"

test-thorough: $(STAMP) ## the attention under sanitizers, on other x86 levels and, with qemu-user, on ARM
	$(PYTEST) -m thorough

test-fast: $(STAMP) ## tests that need neither llama.cpp nor the models
	$(PYTEST) -m "not build and not models and not native and not slow"

test-mlx: $(STAMP) ## the caches and models for mlx-lm; installs mlx (Macs, or Linux with glibc 2.35)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mlx]'
	$(PYTEST) tests/unit/test_mlx_*.py

test-native: $(STAMP) ## our C sources and llama.cpp's own tests of types and operations
	$(PYTEST) -m "(native or build) and not thorough"

test-metal: $(STAMP) ## on a Mac: the Metal kernels through Apple's compiler and on its GPU
	$(BIN)/python bench/metal.py --check

bench-metal: $(STAMP) ## the same, and speeds into docs/metal.md
	$(BIN)/python bench/metal.py

lint: $(STAMP) ## ruff
	$(BIN)/ruff check ggufrq tests bench scripts
	$(BIN)/ruff format --check ggufrq tests bench scripts

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

tables: $(STAMP) ## write the C tables anew from ggufrq/codec/tables.json
	$(BIN)/python -m ggufrq.codec.emit

docs: $(STAMP) ## write the pages of commands and the table of upstream versions anew
	$(BIN)/python -m ggufrq.cli.docs

patches-check: $(STAMP) ## whether the patch set is in order and applies to the pinned llama.cpp
	$(BIN)/ggufrq build --check
	$(BIN)/ggufrq upstream refresh --check

patches-refresh: $(STAMP) ## write the patches as git gives them
	$(BIN)/ggufrq upstream refresh

check: lint types patches-check test-fast ## all checks that take no build
	$(BIN)/python -m ggufrq.codec.emit --check
	$(BIN)/python -m ggufrq.cli.docs --check

wheel: $(STAMP) ## the wheel, in dist
	$(BIN)/python -m hatchling build -t wheel

clean: ## remove .venv and caches of tools (builds of llama.cpp live in the user's cache)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
