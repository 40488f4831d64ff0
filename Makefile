# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help demo test lint core-tests test-full chaos lab tracking-server clean

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

# The environment: made again when what it installs changes; versions come from constraints.txt.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older; set PYTHON=..." >&2; exit 2; }
	@echo "creating $(VENV) and installing (some minutes, about 2 GB; PyTorch is the largest part) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)   ## text -> base model -> two voices -> interview -> promotion, on the CPU, about 3 minutes
	@experiments/demo.sh

test: lint core-tests   ## lint, types, import rules and the core tests, under 10 minutes

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

core-tests: $(READY)
	$(BIN)/python -m pytest --ignore=tests/full -n 2 --dist loadfile

test-full: $(READY)  ## against real S3 servers behind a faulty proxy, PostgreSQL, a browser; Debian, as root
	$(BIN)/python -m pytest tests/full

# CHAOS='--kills 10 --store moto --seed 7' changes it; all options: python -m tests.chaos --help
chaos: $(READY)  ## kill a trainer at 40 and more random moments on each of two faulty stores
	$(BIN)/python -m tests.chaos $(CHAOS)

# LAB='plain refused' runs these scenarios alone: docs/lab.md
lab: $(READY)    ## rent from a pretended vast.ai with stock SkyPilot, preempt, refuse; Debian, as root
	$(BIN)/python -m tests.lab $(LAB)

# SERVER='--allowed-hosts mlflow.example.com --host 0.0.0.0' changes it: docs/tracking-server.md
tracking-server: $(READY)  ## MLflow for a team on this machine: PostgreSQL, accounts; Ctrl-C stops it
	$(BIN)/tessera-exp server up $(SERVER)

clean:           ## remove the environment; .tessera (your runs) stays
	rm -rf $(VENV) .lab *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
