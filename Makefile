# Two commands do everything on a fresh machine (Python 3.11 with pip, git, make; no root): `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types layers unit e2e e2e-triggers cluster cluster-smoke bench bench-flow bench-checkpoint bench-restart bench-goodput bench-serving bench-trigger bench-cluster clean lock

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
	$(BIN)/pytest --numprocesses 2 --dist loadfile

e2e: .venv/.installed
	$(BIN)/pytest -m e2e --ignore tests/flows/triggers

e2e-triggers: .venv/.installed  ## schedule, form, pushes and dead flows on real servers: ten minutes more
	$(BIN)/pytest -m 'e2e and not long' tests/flows/triggers

cluster: .venv/.installed  ## the same on Kubernetes: the cluster of KUBECONFIG, or one of this machine by .ci/cluster
	$(BIN)/pytest -m cluster --durations 10 tests/deployments/test_k8s_server.py tests/test_*cluster*.py

cluster-smoke: .venv/.installed  ## the part of it that a change most likely breaks, in minutes
	$(BIN)/pytest -m cluster --durations 10 tests/deployments/test_k8s_server.py \
	  tests/test_cluster_chain.py::test_from_the_command_to_a_prediction_through_the_service \
	  tests/test_cluster_chain.py::test_again_nothing_runs

bench-cluster: .venv/.installed  ## what orchestration costs at 1, 10 and 100 pipelines; on the cluster of KUBECONFIG, if set
	$(BIN)/python tests/deployments/bench_cluster.py

# The environment. pip compiles what it installs; an uncompiled torch would double every import for ever.
# Debian without python3-venv: virtualenv from PyPI does the same, in a folder of its own.
.venv/.installed: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv 2>/dev/null || \
	  { $(PYTHON) -m pip install --quiet --target .venv/bootstrap virtualenv && \
	    PYTHONPATH=.venv/bootstrap $(PYTHON) -m virtualenv --quiet .venv; }
	@echo "Installing Reprise and what it runs (Prefect, DVC, torch, MLflow, TorchServe, a JRE) into .venv: some minutes, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

# Benchmarks. Peers that are no part of Reprise are installed in a folder of their own.
.bench/.metaflow: .venv/.installed
	@$(BIN)/python -m pip install --quiet --target .bench metaflow==2.19.39
	@touch $@

bench-flow: .bench/.metaflow  ## what orchestration costs, beside bare Prefect, Metaflow and dvc repro
	$(BIN)/python tests/flows/bench_flow.py

.bench/.checkpoint: .venv/.installed
	@$(BIN)/python -m pip install --quiet --target .bench/checkpoint --no-deps \
	  lightning==2.6.6 lightning-utilities pytorch-lightning torchmetrics tqdm psutil \
	  accelerate==1.15.0 torch-checkpointing==0.1.1
	@touch $@

bench-checkpoint: .bench/.checkpoint  ## stall, durability and slowdown of a save, beside its peers
	$(BIN)/python tests/training/bench_checkpoint.py --peers .bench/checkpoint

bench-restart: .venv/.installed  ## from a kill to the first new step, beside plain torchrun
	$(BIN)/python tests/training/bench_restart.py

bench-goodput: .venv/.installed  ## useful time under interruptions, against the analytic optimum
	$(BIN)/python tests/training/bench_goodput.py

bench-serving: .venv/.installed  ## rollouts of good and bad versions under load
	$(BIN)/python tests/tasks/bench_serving.py

bench-trigger: .venv/.installed  ## from a push to the first training step, in parts, beside the bare command
	$(BIN)/python tests/flows/bench_trigger.py

bench: bench-flow bench-checkpoint bench-restart bench-goodput bench-serving bench-trigger bench-cluster

lock:  ## renew the versions that were installed together
	@{ head -1 requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv .bench demo .mypy_cache .ruff_cache .pytest_cache
