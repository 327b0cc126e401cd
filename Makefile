# make help: what each target does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help run lint sdk test bench
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

sdk: $(VENV)/run ## lint, types, tests and size of the React SDK, and its example in a real browser
	@if node -e 'process.exit(parseInt(process.versions.node) < 20)' 2>/dev/null && command -v npm >/dev/null; then \
	    cd sdk/react && npm ci --no-audit --no-fund --loglevel=error && npm run check && npm run e2e; \
	else \
	    echo '*** no Node.js 20 with npm on PATH: the React SDK was NOT tested ***' >&2; \
	    case "$$CI" in 1 | true) exit 1 ;; esac; \
	fi

test: lint sdk ## lint and every test; installs what it needs
	$(BIN)/pytest -n 2

bench: $(VENV)/test ## the benchmark, at most 10 minutes: bench/RESULTS.md (BENCH=--quick for a smoke run)
	$(BIN)/python bench/run.py $(BENCH)
