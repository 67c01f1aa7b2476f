# Targets are listed by `make`. Set-up happens when it is needed, into .venv, and is not repeated while pyproject.toml stays as it is.
#
#   PYTHON   interpreter to build .venv with, 3.11 or newer      make run PYTHON=python3.13
#   PORT     where `make run` serves                             make run PORT=9000
#   ARGS     more arguments for pytest or the benchmarks         make test ARGS="-k search"
#   SEED     of `make simulate`, `crash`, `linear`, `soak`; STEPS, SECONDS: for how long                make crash SECONDS=300
#   VECTORS  folder of a collection for `make bench`             make bench VECTORS=data/scifact
#   DOCUMENTS  of `make scale`                                    make scale DOCUMENTS=1000000

PYTHON ?= python3
PORT ?= 8080
HOST ?= 127.0.0.1
STORE ?= ./data/indices
ARGS ?=
VECTORS ?=

VENV := .venv
BIN := $(VENV)/bin
SOURCES := engine handler infra tests benchmarks
# uv sets up in seconds where pip takes a minute; the result is the same.
INSTALL := $(if $(shell command -v uv 2>/dev/null),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)
# One BLAS thread a worker: parallelism is across segments and requests.
export OPENBLAS_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help run test torture simulate crash linear soak overload fuzz monitoring types fmt lint check layers bench scale golden clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .stamp-run ## set up, index the bundled demo collection, and serve it on 127.0.0.1:8080
	@$(BIN)/tartan info demo --store $(STORE) --json 2>/dev/null | grep -q '"documents":[1-9]' \
		|| $(BIN)/tartan index engine/demo/demo.jsonl --name demo --store $(STORE)
	@echo "serving $(STORE) on http://$(HOST):$(PORT) (its API: /swagger-ui); Ctrl-C ends it"
	@exec $(BIN)/tartan serve --host $(HOST) --port $(PORT) --store $(STORE) --model hashing

test: .stamp-dev ## set up and run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

torture: .stamp-dev ## run the long tests too
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

SEED ?= 1
STEPS ?= 200000
SECONDS ?= 120
simulate: .stamp-dev ## the engine on a simulated S3 with faults: make simulate SEED=7 STEPS=1000000 [ARGS=--mutations] (docs/simulation.md)
	$(BIN)/python -m tests.simulation --seed $(SEED) --steps $(STEPS) $(ARGS)

crash: .stamp-dev ## kill real processes over a directory and an S3 server: make crash SECONDS=300 [SEED=7]
	PYTHONPATH=.:tests $(BIN)/python -m crash --store directory --seconds $(SECONDS) --seed $(SEED) $(ARGS)
	PYTHONPATH=.:tests $(BIN)/python -m crash --store s3 --seconds $(SECONDS) --seed $(SEED) $(ARGS)

linear: .stamp-dev ## record histories through three servers, which are killed now and then, and check that they are linearizable: make linear SECONDS=60
	PYTHONPATH=.:tests $(BIN)/python -m linearizability --seconds $(SECONDS) --kill-every-s 3 --seed $(SEED) $(ARGS)

TARGET ?=
fuzz: .stamp-dev ## fuzz every decoder, or one: make fuzz SECONDS=600 [TARGET=manifest SEED=7] (docs/fuzzing.md; guided by coverage where atheris is installed)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) $(if $(TARGET),--target $(TARGET)) $(ARGS)

soak: .stamp-dev ## mixed load on two servers: nothing wrong, nothing grows: make soak SECONDS=3600 [ARGS="--store directory"] (docs/load.md)
	PYTHONPATH=.:tests $(BIN)/python -m soak --seconds $(SECONDS) --seed $(SEED) $(ARGS)

overload: .stamp-dev ## one server, offered four times what it can do (docs/load.md)
	PYTHONPATH=.:tests $(BIN)/python -m soak.overload $(ARGS)

monitoring: .stamp-dev ## provoke every alarm against a real Prometheus and ask every panel of the dashboard (needs prometheus, promtool)
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_monitoring.py $(ARGS)

types: .stamp-dev ## check the types
	$(BIN)/mypy

fmt: .stamp-dev ## format the code and sort imports
	$(BIN)/ruff check --select I --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lint: .stamp-dev ## look for mistakes without running the code
	$(BIN)/ruff check $(SOURCES)

layers: .stamp-dev
	$(BIN)/python -m pytest tests/test_house.py

check: lint types layers ## lint, types, and the rules of the house

bench: .stamp-bench ## measure against peers: make bench VECTORS=folder [ARGS="--nbits 4,2 --sweep"]
	@test -n "$(VECTORS)" || { echo "make bench wants VECTORS=folder, see benchmarks/README.md"; exit 2; }
	$(BIN)/python -m benchmarks.run --vectors $(VECTORS) $(ARGS)

DOCUMENTS ?= 20000
scale: .stamp-dev ## ingest, search, delete, compact and verify at size: make scale DOCUMENTS=1000000 (docs/scale.md)
	$(BIN)/python -m benchmarks.scale --documents $(DOCUMENTS) --work data/scale/$(DOCUMENTS) $(ARGS)

golden: .stamp-dev ## write the bytes of a new format version; refuses to touch old ones
	$(BIN)/python -m tests.golden.make

clean: ## remove everything that make made; indices in data/ stay
	rm -rf $(VENV) .stamp-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

include infra/lambda.mk
include infra/container.mk

.PHONY: lambda-local
lambda-local: .stamp-dev $(SAM_VENV)/.stamp ## serve the Lambda function on this machine, in AWS's runtime emulator: make lambda-local PORT=3000 (docs/lambda.md)
	@PATH="$(abspath $(SAM_VENV))/bin:$$PATH" TARTAN_INDEX_DIR="$${TARTAN_INDEX_DIR:-$(abspath $(STORE))}" \
		$(BIN)/python -m infra.local.lambda_gateway --port $(PORT) $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

.stamp-run: pyproject.toml | $(BIN)/python
	@echo "setting up $(VENV)"
	@$(INSTALL) -e .
	@touch $@

.stamp-dev: pyproject.toml | $(BIN)/python
	@echo "setting up $(VENV) for development"
	@$(INSTALL) -e '.[dev,encoder]'
	@touch .stamp-run $@

.stamp-bench: .stamp-dev
	@$(INSTALL) -e '.[bench]'
	@touch $@
