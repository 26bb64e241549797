# Two commands do everything on a fresh machine (Python 3.11 with pip, git, make; no root): `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types layers unit e2e bench-flow bench-checkpoint bench-restart bench-serving clean lock

demo: .venv/.installed  ## the whole chain on this machine, through two spot interruptions, to a model in service
	@$(BIN)/reprise demo

test: check e2e  ## everything that runs without a cluster and a GPU; skips say why

check: lint types layers unit

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

layers: .venv/.installed
	$(BIN)/lint-imports

unit: .venv/.installed
	$(BIN)/pytest

e2e: .venv/.installed
	$(BIN)/pytest -m e2e

# The environment. pip compiles what it installs; an uncompiled torch would double every import for ever.
# Debian without python3-venv: virtualenv from PyPI does the same, in a folder of its own.
.venv/.installed: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv 2>/dev/null || \
	  { $(PYTHON) -m pip install --quiet --target .venv/bootstrap virtualenv && \
	    PYTHONPATH=.venv/bootstrap $(PYTHON) -m virtualenv --quiet .venv; }
	@echo "Installing Reprise and what it runs (Prefect, DVC, torch, MLflow, TorchServe, a JRE) into .venv: some minutes, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

lock:  ## renew the versions that were installed together
	@{ head -1 requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv demo .mypy_cache .ruff_cache .pytest_cache
