# Commands for people and for CI. Everything runs from .venv, which `make setup` builds from the lock file.
SHELL := /bin/bash
PYTHON ?= python3
WORKDIR ?= work
BIN := .venv/bin
READY := .venv/.ready
UV_VERSION := 0.13.9
UV := $(if $(shell uv --version 2>/dev/null),uv,.uv/bin/uv)
# Tests run in parallel, those of one file in one process, in the order that tests/conftest.py sets.
PARALLEL ?= -n auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
HERE := not e2e and not e2e_kfp and not gpu and not kernels and not peers

.DEFAULT_GOAL := help
.PHONY: help setup run test lint test-slow test-both test-all test-gpu test-kernels test-peers images e2e e2e-kfp gen lock

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv from requirements.lock (needs Python 3.11 or newer and 6 GB)

run: setup ## train the tiny preset on this machine, start to end; WORKDIR=work ARGS="--set train.steps=20"
	$(BIN)/yaongi run tiny --workdir $(WORKDIR) $(ARGS)

lint: setup ## style, import direction and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint ## lint, and the tests that need no cluster, no GPU and less than a minute each
	$(BIN)/pytest $(PARALLEL) -m "not slow and not proof and $(HERE)"

# Only files with slow tests: collecting all files takes longer than some of these tests.
test-slow: setup ## the slow tests
	$(BIN)/pytest $(PARALLEL) -m "slow and not proof and $(HERE)" $$(grep -rl 'mark\.slow' tests --include='test_*.py')

test-both: lint ## test and test-slow together, as in CI: files are collected once, and shared fixtures are made once
	$(BIN)/pytest $(PARALLEL) -m "not proof and $(HERE)"

test-all: test test-slow ## both of these and the proofs; run it after a change of torch, tokenizers or tiktoken, of trainer/optim, FP8, compile or the model's numbers
	$(BIN)/pytest $(PARALLEL) -m "proof and $(HERE)"

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

TE_WHEEL ?=
test-kernels: .venv-kernels/.ready ## the calls of Transformer Engine and mamba_ssm, with the real packages, without a GPU; TE_WHEEL=file saves 20 min
	TRITON_INTERPRET=1 .venv-kernels/bin/python -m pytest -m kernels tests/kernels

test-peers: .venv-peers/.ready ## megatron-core trains from our token files and weights, exports in lm_eval; in a separate environment (5 GB)
	.venv-peers/bin/python -m pytest -m peers tests/peers

.venv-peers/.ready: requirements-peers.txt | $(UV)
	$(CHECK_PYTHON)
	$(UV) venv --quiet --clear --no-python-downloads --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv-peers
	$(UV) pip install --quiet --python .venv-peers/bin/python -r requirements-peers.txt
	@touch $@

# The registry has Transformer Engine for torch only as source. Building it takes 20 minutes and needs a CUDA toolkit
# (CUDA_HOME) and the headers of cuDNN, NCCL and NVSHMEM (CPATH).
.venv-kernels/.ready: requirements-kernels.txt | $(UV)
	$(CHECK_PYTHON)
	$(UV) venv --quiet --clear --no-python-downloads --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv-kernels
	$(UV) pip install --quiet --python .venv-kernels/bin/python -r requirements-kernels.txt
	$(UV) pip install --quiet --python .venv-kernels/bin/python --no-build-isolation --no-deps $(or $(TE_WHEEL),transformer_engine_torch==2.20.2)
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	  $(UV) pip install --quiet --python .venv-kernels/bin/python --no-build-isolation --no-deps mamba_ssm==2.3.1
	$(UV) pip install --quiet --python .venv-kernels/bin/python --no-deps --no-build-isolation -e .
	@touch $@

images: setup ## build both container images and their SBOMs (dist/sbom); docker/build.sh lists BASE_IMAGE, TAG and other options
	docker/build.sh

e2e: setup ## the end-to-end test on the cluster of KUBECONFIG; see tests/e2e/run.sh
	tests/e2e/run.sh $(TESTS)

e2e-kfp: setup ## the end-to-end test on the Kubeflow Pipelines of KFP_HOST; see tests/e2e_kfp/run.sh
	tests/e2e_kfp/run.sh

gen: setup ## write the generated files: compiled pipeline, manifests, JSON schema, reference pages
	$(BIN)/python -m pipelines.compile
	$(BIN)/python -m manifests.generate
	$(BIN)/python -m manifests.schema
	$(BIN)/python -m manifests.metricsdoc
	$(BIN)/python -m manifests.fabric
	$(BIN)/python -m manifests.lint.schemas
	$(BIN)/python -m manifests.lint.page

LOCK := pip compile pyproject.toml --python-version 3.11 --universal --generate-hashes --no-emit-index-url
TRAINER := --extra train --extra eval --extra serve --extra trackers --extra data --extra buckets --extra cluster
lock: setup ## resolve the dependencies again; those of GPUs are sources that need torch to name theirs
	$(UV) $(LOCK) --extra train --extra eval --extra serve --extra onnx --extra trackers --extra data --extra cluster --extra dev -o requirements.lock
	$(UV) $(LOCK) --extra data --extra buckets --extra cluster -o requirements-pipeline.lock
	$(UV) $(LOCK) $(TRAINER) -o requirements-trainer.lock
	$(UV) $(LOCK) $(TRAINER) --extra cuda --prerelease explicit --no-build-isolation \
	  --python .venv/bin/python -c requirements-trainer.lock -o requirements-gpu.lock
	echo uv==$(UV_VERSION) | $(UV) $(subst pyproject.toml,-,$(LOCK)) --no-annotate -o requirements-uv.lock
	printf '%s\n' build 'setuptools>=77' | $(UV) $(subst pyproject.toml,-,$(LOCK)) -c requirements.lock --no-annotate -o requirements-build.lock

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
  { echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
endef

$(READY): requirements.lock pyproject.toml | $(UV)
	$(CHECK_PYTHON)
	@[ -x $(BIN)/python ] || $(UV) venv --quiet --no-python-downloads --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	@echo "installing about 6 GB into .venv, most of it PyTorch; this takes minutes, depending on the network"
	$(UV) pip install --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

.uv/bin/uv:
	$(CHECK_PYTHON)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments; install its venv package: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock

.PHONY: uv
uv:
	@true
