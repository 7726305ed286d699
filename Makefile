# `make demo` and `make test` do all their own set-up; a second call installs nothing.
#
#   PYTHON   the interpreter that .venv is made from, 3.11 or newer     make test PYTHON=python3.12
#   PIP_*    pip's own settings are honoured; for CPU-only PyTorch see constraints.txt

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test gpu lint types clean
.NOTPARALLEL:

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1@/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-14s%s\n", $$1, $$2 }'

demo: $(VENV)/.installed-demo ## set up, then run `spectralar demo`
	@$(BIN)/spectralar demo

test: lint types ## set up, then lint, types and tests
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadgroup --quiet

gpu: $(VENV)/.installed-dev ## tests that need a GPU, a process for each file; then compute-sanitizer on small cases
	@grep -rl 'mark\.gpu' tests --include='test_*.py' | OMP_NUM_THREADS=1 xargs -n 1 -P 4 $(BIN)/python -m pytest -m gpu -q
	@$(BIN)/python -m tests.kernels.small
	@for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m tests.kernels.small || exit 1; done

lint: $(VENV)/.installed-dev ## style and format (ruff)
	@echo "== lint"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet

types: $(VENV)/.installed-dev ## types (mypy)
	@echo "== types"
	@$(BIN)/mypy

clean: ## remove caches and build output; .venv and runs/ stay
	@rm -rf build dist spectralar.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find kernels spectralar training bench tests -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing venv puts in place: where it is missing, .venv is missing or was cut short.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "SpectralAR needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== making $(VENV) from $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed-dev:  EXTRAS := dev,demo,bench
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "== installing spectralar[$(EXTRAS)] into $(VENV) (the first time this downloads PyTorch: minutes)"
	@$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
