# Two commands do everything: `make demo` and `make test`. Each sets up .venv by itself; `make help` lists the rest.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := $(VENV)/.demo-installed
DEV := $(VENV)/.dev-installed
# What is installed depends on these: a change of either installs again.
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check docs clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8
	@echo
	@echo 'ARGS passes arguments on: make demo ARGS=--fast, make test ARGS="tests/losses -x". Variables: PYTHON=$(PYTHON) WORKERS=$(WORKERS)'

demo: $(DEMO) ## distil a real teacher into a student of half its layers, with baselines (15 minutes; ARGS=--fast: 3)
	$(RUN) examples/quickstart.py $(ARGS)

# One thread a process, since the workers share the cores. A file's tests stay together: they share its fixtures.
test: check ## lint, types and the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(DEV) ## ruff (lint and format) and mypy --strict
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(DEV) ## build the documentation into docs/_build/html; a warning is an error
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html

clean: ## remove what was built and cached, and .venv; runs/ and saved_models/ stay
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/generated .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last when a virtual environment is made, so that an interrupted one is made again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(DEMO): $(PINS) | $(VENV)/bin/pip
	$(RUN) -m pip install --quiet --use-pep517 -c constraints.txt -e '.[demo]'
	@touch $@

# --use-pep517: the pip that comes with Python 3.10 would else build source packages (seqeval) in a way that fails.
# The development set holds the demo's, so it counts for both.
$(DEV): $(PINS) | $(VENV)/bin/pip
	$(RUN) -m pip install --quiet --use-pep517 -c constraints.txt -e '.[dev]'
	@touch $(DEMO) $@
