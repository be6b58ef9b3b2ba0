# `make` alone prints the targets. Every target makes .venv if it is absent and installs only what it needs.
#   make test PYTHON=python3.12                                   another interpreter (>= 3.11)
#   make test TORCH_INDEX_URL=URL   another build of torch
VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX_URL ?=
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) -e
SUITES := atari+crafter+dmc+minigrid+mujoco
# One thread keeps its pace when other jobs use the machine.
ENV = OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true
FAST_TESTS = $(wildcard tests/contracts tests/test_errors.py tests/test_presets.py tests/test_returns.py \
	tests/test_distributions.py tests/test_optim.py)

PROOFS = prove-cartpole prove-pendulum prove-robot prove-pixels
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-hour test test-all check bench clean prove-tdmpc2 $(PROOFS) prove-offline prove-online \
	prove-demos

help:  ## print this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lit-wm needs Python >= 3.11, '$(PYTHON)' is older. Use: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing .[$(subst +,$(comma),$*)] into $(VENV): this takes minutes ..."
	$(INSTALL) ".[$(subst +,$(comma),$*)]"
	@touch $@
comma := ,

setup: $(VENV)/.installed-$(SUITES)+dev  ## .venv with everything for development

demo: $(VENV)/.installed-atari  ## train DreamerV3 on ALE/Pong from pixels, <= 10 minutes on 2 CPU cores
	$(ENV) $(BIN)/python -m lit_wm fit --config configs/dreamer_atari.yaml --config configs/overlay/demo.yaml

demo-hour: $(VENV)/.installed-atari  ## the same for an hour: the dream shows the game
	$(ENV) $(BIN)/python -m lit_wm fit --config configs/dreamer_atari.yaml --config configs/overlay/demo.yaml \
		--config configs/overlay/demo_hour.yaml

test: $(VENV)/.installed-$(SUITES)+test  ## the tests, <= 12 minutes on 2 cores
	$(ENV) $(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-$(SUITES)+test  ## the tests and the longer proofs
	$(ENV) $(BIN)/python -m pytest

check: $(VENV)/.installed-$(SUITES)+dev  ## format, lint, types, import rules, fast tests: < 2 minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(ENV) $(BIN)/python -m pytest -q $(FAST_TESTS)

bench: $(VENV)/.installed-atari  ## time of updates and plans, and their share of the GEMM peak
	$(ENV) $(BIN)/python benchmarks/step.py
	$(ENV) $(BIN)/python benchmarks/plan.py

$(PROOFS): prove-%: $(VENV)/.installed-plots
	$(BIN)/python benchmarks/prove.py $*

prove-cartpole:  ## CartPole from its numbers: 3 seeds
prove-pendulum:  ## Pendulum: 2 seeds
prove-robot:  ## the robot with LiDAR
prove-pixels:  ## Catch from its picture

prove-tdmpc2: $(VENV)/.installed-dmc+plots  ## TD-MPC2 on Pendulum, cart-pole swing-up and the robot
	for task in pendulum swingup robot; do $(ENV) $(BIN)/python benchmarks/prove.py tdmpc2-$$task || exit 1; done

# Of one proof the other can go on: prove-online begins with the checkpoints of prove-offline.
prove-offline: $(VENV)/.installed-plots+baselines  ## both models from data alone, beside d3rlpy
prove-online: $(VENV)/.installed-plots+baselines  ## offline checkpoints go on online
prove-demos: $(VENV)/.installed-plots  ## what demonstrations save the robot
prove-offline prove-online prove-demos: prove-%:
	$(BIN)/python benchmarks/prove_offline.py $*

.PHONY: notebooks
notebooks: $(VENV)/.installed-dmc+notebooks  ## open them in JupyterLab
	$(ENV) $(BIN)/python -m jupyterlab

clean:  ## remove caches and build products; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
