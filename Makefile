# make help: what each target does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help run lint sdk test bench fuzz stress conformance image-test systemd-test install uninstall
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# One stamp for each set of packages, made again when the metadata changes. What runs is the versions of
# requirements.lock, here as in the image.
$(VENV)/run: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
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
	@if node -e 'process.exit(+(parseInt(process.versions.node) < 20))' 2>/dev/null && command -v npm >/dev/null; then \
	    cd sdk/react && npm ci --no-audit --no-fund --loglevel=error && npm run check && npm run e2e; \
	else \
	    echo '*** no Node.js 20 with npm on PATH: the React SDK was NOT tested ***' >&2; \
	    case "$$CI" in 1 | true) exit 1 ;; esac; \
	fi

test: lint sdk ## lint and every test; installs what it needs
	$(BIN)/pytest -n 2

bench: $(VENV)/test ## the benchmark, at most 10 minutes: bench/RESULTS.md (BENCH=--quick for a smoke run)
	$(BIN)/python bench/run.py $(BENCH)

conformance: $(VENV)/test ## the whole Autobahn TestSuite, about 13 minutes; installs it where Python 2.7 is
	$(BIN)/python tests/autobahn.py

image-test: $(VENV)/test ## build the Dockerfile with buildah and run the image: needs root, buildah and debootstrap
	@$(BIN)/pytest -n 0 -v -rP tests/image/check_image.py

install: ## as a service of this machine: PREFIX=/usr/local, DESTDIR; run again it upgrades and keeps what you have set
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' sh systemd/install.sh install

uninstall: ## take the service away again; configuration, keys and data stay
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' sh systemd/install.sh uninstall

systemd-test: $(VENV)/test ## the installed service under a real systemd, in a Debian machine of its own; as root, 6 minutes
	@$(BIN)/pytest -n 0 -v -s tests/systemd/check_service.py

stress: $(VENV)/test ## too much of everything on the real daemon, some 10 minutes (STRESS='--scale 0.1', or a part)
	$(BIN)/python tests/stress.py $(STRESS)

fuzz: $(VENV)/test ## a million hostile inputs, at most 15 minutes (FUZZ="--seed 7 --inputs 10000")
	$(BIN)/python tests/fuzz.py $(FUZZ)
