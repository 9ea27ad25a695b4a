# Every target does the set-up it needs, in .venv: no root, no apt, no sourced ROS.
# PYTHON=/path/to/python3.11 chooses the interpreter.
PYTHON ?= $(shell tools/find_python)
BIN := .venv/bin
# Tests: one machine, and a domain of this run, so that neither a robot nearby nor another run takes part.
TEST_ENV = AMENT_PREFIX_PATH=$(CURDIR)/.venv ROS_DOMAIN_ID=$$(( $$$$ % 100 + 1 )) \
	ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST
# What a sourced ROS 2 or another environment would mix in.
CLEAN = env -u PYTHONPATH -u PYTHONHOME -u AMENT_PREFIX_PATH -u _ROS_WHEELS_BOOTSTRAP_COMPLETE
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv venv-dev demo test test-fast lint format bench colcon clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## set up what runs the node (no torch)
	@$(PYTHON) tools/setup_env.py

venv-dev: ## set up what tests and lint need, too
	@$(PYTHON) tools/setup_env.py --with dev

demo: venv ## start the real node, play camera footage into it, ask questions
	@$(CLEAN) AMENT_PREFIX_PATH=$(CURDIR)/.venv $(BIN)/mobilevlm demo $(ARGS)

test: venv-dev lint ## lint, then all tests (ARGS='-k name' for some)
	@$(CLEAN) $(TEST_ENV) $(BIN)/python -m pytest $(ARGS)

test-fast: venv-dev ## only tests that take seconds and need no model
	@$(CLEAN) $(TEST_ENV) $(BIN)/python -m pytest -m 'not slow and not model and not gpu' $(ARGS)

lint: venv-dev ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(CLEAN) $(BIN)/python -m mypy

format: venv-dev ## let ruff repair what it can
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: venv ## measure the node on this machine (results: benchmarks/)
	@$(CLEAN) $(TEST_ENV) $(BIN)/mobilevlm build nano
	@$(CLEAN) $(TEST_ENV) $(BIN)/python benchmarks/node_figures.py $(ARGS)

colcon: ## build both packages in a workspace with a sourced ROS 2
	COLCON_DEFAULTS_FILE=colcon.defaults.yaml colcon build

clean: ## remove what was built here (the cache in ~/.cache/mobilevlm_ros stays)
	rm -rf .venv build install log dist demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
