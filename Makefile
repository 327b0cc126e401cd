# make help: what each target does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help run lint test bench fuzz
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# One stamp for each set of packages, made again when the metadata changes.
$(VENV)/run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@
$(VENV)/test: pyproject.toml $(VENV)/run
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

run: $(VENV)/run ## start the daemon with its own Redis-compatible server on http://127.0.0.1:8080
	$(BIN)/tornado-bcast serve

lint: $(VENV)/test ## ruff, ruff format and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint and every test; installs what it needs
	$(BIN)/pytest -n 2

bench: $(VENV)/test ## the benchmark, at most 10 minutes: bench/RESULTS.md (BENCH=--quick for a smoke run)
	$(BIN)/python bench/run.py $(BENCH)

fuzz: $(VENV)/test ## a million hostile inputs, at most 15 minutes (FUZZ="--seed 7 --inputs 10000")
	$(BIN)/python tests/fuzz.py $(FUZZ)
