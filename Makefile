# Everything runs from a fresh clone, without root. Environments are made with venv and pip in .venv*.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first interpreter of a supported version; `make PYTHON=/path/to/python3.12 ...` chooses another.
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(shell $(p) -c \
  'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 && echo $(p))))
WORKDIR ?= runs/demo
PYTEST_ARGS ?=
# Test processes side by side; a file's tests stay together, for their shared fixtures.
TEST_WORKERS ?= 2
UV := uv==0.13.9

export JAX_PLATFORMS ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# $(call make_venv,DIR): a bare environment, after checking the interpreter.
define make_venv
@if [ -z "$(PYTHON)" ]; then \
  echo "make: needs Python 3.11 or 3.12; none was found as python3, python3.12 or python3.11; pass PYTHON=/path/to/python" >&2; \
  exit 2; fi
@echo "==> $(1): making an environment with $$($(PYTHON) --version)"
@[ -x $(1)/bin/pip ] || $(PYTHON) -m venv $(1)
endef

# $(call install,DIR,ARGUMENTS): uv, inside the environment, is quick; pip does the same when uv cannot be had or fails.
install = { $(1)/bin/pip install -q $(UV) \
  && UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(1)/bin/uv pip install -q --python $(1)/bin/python $(2); } \
  || { echo "==> $(1): uv could not install it, using pip (slower)"; $(1)/bin/pip install -q $(2); }

.PHONY: help demo test test-all lint format lock clean-runs prepare-environment

help:  ## this list
	@echo "make TARGET, where TARGET is one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.done prepare-environment  ## data, three training stages, a generated video and a report in runs/demo/
	@echo "==> demo: training all stages and generating, in $(WORKDIR)"
	@.venv/bin/python -m experiments.demo --workdir=$(WORKDIR)

test: lint  ## lint and the quick tests
	@echo "==> test: quick tests"
	@.venv/bin/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-all: lint .venv-parity/.done  ## lint and every test, the slow ones and the comparisons with PyTorch included
	@echo "==> test-all: every test, in .venv-parity"
	@.venv-parity/bin/python -m pytest -q --runslow -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: .venv/.done  ## ruff: rules and format
	@echo "==> lint: ruff check, ruff format --check"
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

format: .venv/.done  ## ruff: fix and format
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

lock: .venv/.done  ## resolve requirements.in into requirements.txt
	@UV_CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/uv pip compile -q --universal --python-version 3.11 \
	  --no-strip-extras --no-annotate requirements.in -o requirements.txt

clean-runs:  ## remove everything under runs/
	rm -rf runs

# The environments by name: `make .venv-prepare`.
.PHONY: .venv .venv-parity .venv-prepare
.venv .venv-parity .venv-prepare: %: %/.done

.venv/.done: requirements.txt requirements-test.txt
	$(call make_venv,.venv)
	@echo "==> .venv: installing requirements-test.txt (the runtime and the tests)"
	@$(call install,.venv,-r requirements-test.txt)
	@touch $@

.venv-parity/.done: requirements.txt requirements-test.txt requirements-parity.txt
	$(call make_venv,.venv-parity)
	@echo "==> .venv-parity: installing requirements-parity.txt (PyTorch, diffusers, transformers)"
	@$(call install,.venv-parity,-r requirements-parity.txt)
	@touch $@

# Pose detection is worth having, not needed: without it the real clips train the weaker conditions.
prepare-environment:
	@$(MAKE) --no-print-directory .venv-prepare/.done || { rm -rf .venv-prepare; \
	  echo "==> .venv-prepare: a package of requirements-prepare.txt could not be installed (named above);" \
	    "going on without pose detection, so recorded clips get no keypoints" >&2; }

.venv-prepare/.done: requirements-prepare.txt
	$(call make_venv,.venv-prepare)
	@echo "==> .venv-prepare: installing requirements-prepare.txt (pose detection)"
	@$(call install,.venv-prepare,--no-deps -r requirements-prepare.txt)
	@touch $@
