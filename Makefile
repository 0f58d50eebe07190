# `make` lists what can be done. Needs GNU make and Python 3.11 or newer; the rest is set up in .venv on first use.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

export PYTHON
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-newest coverage check lint format types imports bench chaos lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

run: .venv/ready ## Start the hub (options: make run ARGS="--port 9000")
	@exec $(BIN)/agentcast serve $(ARGS)

test: .venv/ready ## Run all tests (some: make test ARGS="tests/unit -k outbox")
	@scripts/setup.sh tools
	@$(BIN)/python -m pytest $(ARGS)

test-newest: .venv/ready ## Run the unit tests on the newest Python that is installed besides the one of .venv
	@scripts/setup.sh tools
	@scripts/setup.sh newest
	@if [ -e .venv-newest ]; then .venv-newest/bin/python -m pytest tests/unit $(ARGS); \
	else echo "No other Python from 3.11 to 3.14 is installed: there is nothing to run."; fi

coverage: .venv/ready ## Run all tests and report what they cover, hubs in processes of their own too (half as long again)
	@scripts/setup.sh tools
	@$(BIN)/python -m pytest --cov $(ARGS)

check: lint types imports test test-newest ## Run all that CI runs: lint, format, types, import rules, tests

lint: .venv/ready ## Check style and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: .venv/ready ## Fix style and formatting where a program can
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

types: .venv/ready ## Check types
	@$(BIN)/mypy

imports: .venv/ready ## Check that imports point down only
	@$(BIN)/lint-imports

bench: .venv/ready ## Measure, and print the numbers
	@$(BIN)/python -m benchmarks $(ARGS)

chaos: .venv/ready ## Kill, stop, empty and fill Redis and hubs at random, ten seeds (one: make chaos ARGS="--first 7 --seeds 1")
	@$(BIN)/python -m tests.faults.chaos $(ARGS)

lock: ## Renew requirements.lock with the newest versions that fit
	@scripts/setup.sh lock

clean: ## Remove .venv and everything that tools left behind
	rm -rf .venv .venv-newest build dist .coverage .coverage.* htmlcov .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp: set-up runs again only when one of these has changed.
.venv/ready: pyproject.toml requirements.lock scripts/setup.sh
	@scripts/setup.sh venv
	@touch $@
