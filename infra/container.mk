# Containers, replicas, load: included by the Makefile. `make` lists the targets.
#
#   BASE, PIP_CONF, CA   base image, pip.conf and certificate bundle for `make image` (infra/local/image.sh)
#   STORE                for `make replicas`: s3://bucket/prefix or a directory instead of an S3 server in memory
#   URL, INDEX, SECONDS, CONNECTIONS   for `make load`

OPS_VENV := $(VENV)/ops
OPS := $(OPS_VENV)/bin
URL ?=
INDEX ?=
SECONDS ?= 20
CONNECTIONS ?= 8

.PHONY: replicas load image image-test image-lambda image-lambda-test lock audit sbom infra-lint

replicas: .stamp-dev ## nginx and three servers over one bucket on this machine: make replicas [STORE=s3://bucket/prefix]
	@exec $(BIN)/python infra/local/replicas.py --port $(PORT) $(if $(filter-out file,$(origin STORE)),--store $(STORE)) $(ARGS)

load: .stamp-dev ## load test with wrk, result in data/load-test.json: make load [URL=... INDEX=... SECONDS=20 CONNECTIONS=8]
	@$(BIN)/python infra/load/run.py --url "$(URL)" --index "$(INDEX)" --seconds $(SECONDS) --connections $(CONNECTIONS)

image: ## build the container image with buildah (with docker: see infra/Dockerfile)
	@infra/local/image.sh build

image-test: ## start the image's server on a read-only root without a shell, and ask it
	@infra/local/image.sh test

image-lambda: image ## build the image of Lambda's encoder function on top of it
	@infra/local/image.sh lambda

image-lambda-test: $(SAM_VENV)/.stamp ## start that image in AWS's runtime emulator and let it encode: make image-lambda-test [MODEL=folder]
	@PATH="$(abspath $(SAM_VENV))/bin:$$PATH" infra/local/image.sh lambda-test

lock: ## pin every package of the image, with hashes
	uv pip compile pyproject.toml --extra encoder --extra aws --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header -q -o infra/requirements.lock
	printf 'awslambdaric>=4.2\n' | uv pip compile - -c infra/requirements.lock --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header -q -o infra/lambda-encoder.lock
	printf 'setuptools>=77\nwheel\n' | uv pip compile - --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header -q -o infra/build.lock

audit: .stamp-ops ## known vulnerabilities of the locked packages (3: the database could not be reached)
	@PIP_AUDIT=$(OPS)/pip-audit infra/local/audit.sh

sbom: .stamp-ops ## what the image contains, as CycloneDX: dist/sbom.json
	@mkdir -p dist
	@PYTHONWARNINGS=ignore $(OPS)/cyclonedx-py requirements infra/requirements.lock --pyproject pyproject.toml --output-format JSON --output-file dist/sbom.json
	@echo dist/sbom.json

infra-lint: .stamp-ops ## check ecs.yaml with cfn-lint, and compose.yaml against its schema
	$(OPS)/cfn-lint infra/ecs.yaml
	$(OPS)/check-jsonschema --builtin-schema vendor.compose-spec infra/compose.yaml

.stamp-ops: | $(BIN)/python
	@$(PYTHON) -m venv $(OPS_VENV)
	@$(if $(shell command -v uv 2>/dev/null),uv pip install --quiet --python $(OPS)/python,$(OPS)/python -m pip install --quiet) \
		cfn-lint check-jsonschema pip-audit cyclonedx-bom
	@touch $@
