# Lambda and Step Functions: package, validate, run locally. Included by the Makefile of the root; docs/serverless.md says how to deploy.
#
#   ARCH    of the functions, as the template's parameter Architecture    make sam-build ARCH=x86_64
#   STACK   for `make deploy`

ARCH ?= arm64
STACK ?= tartan
LAMBDA := build/lambda-$(ARCH)
LAMBDA_PYTHON := 3.13
SAM_VENV := build/venv-sam
LAMBDA_MACHINE := $(if $(filter arm64,$(ARCH)),aarch64,x86_64)
# uv resolves for another platform by itself; pip wants every tag that will do.
PIP_TAGS := $(foreach tag,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014,--platform $(tag)_$(LAMBDA_MACHINE))
LAMBDA_INSTALL := $(if $(shell command -v uv 2>/dev/null),uv pip install --quiet --python-version $(LAMBDA_PYTHON) --python-platform $(LAMBDA_MACHINE)-manylinux_2_28,$(PYTHON) -m pip install --quiet --disable-pip-version-check --python-version $(LAMBDA_PYTHON) --implementation cp $(PIP_TAGS))
# Bytecode is the same for all machines, but of one version of Python. In a function no module can be compiled for the next start, and times of files are
# not what they were, so it is shipped, and trusted without a look at the source. Of the interpreters that there are, the first that starts (pyenv's
# shim does not for a version that is not chosen); uv would fetch one.
LAMBDA_BIN = $(firstword $(shell for one in python$(LAMBDA_PYTHON) $$HOME/.pyenv/versions/$(LAMBDA_PYTHON)*/bin/python$(LAMBDA_PYTHON); do \
	$$one --version >/dev/null 2>&1 && echo $$one; done; uv python find $(LAMBDA_PYTHON) 2>/dev/null) $(LAMBDA_PYTHON))
# botocore brings the descriptions of 400 services; one is called.
BOTOCORE_KEPT := stepfunctions sts
SAM = PATH="$(abspath $(SAM_VENV))/bin:$$PATH" SAM_CLI_TELEMETRY=0 AWS_DEFAULT_REGION=$${AWS_DEFAULT_REGION:-us-east-1} sam

.PHONY: sam-validate sam-build deploy sfn-local lambda-content

sam-validate: $(SAM_VENV)/.stamp ## check template.yaml with SAM and cfn-lint, and the state machines with asl-validator if it is there
	$(SAM) validate --lint
	$(SAM_VENV)/bin/cfn-lint template.yaml
	@if command -v asl-validator >/dev/null; then for machine in infra/*.asl.json; do asl-validator --json-path $$machine || exit 1; done; \
		else echo "asl-validator is not installed (npm install -g asl-validator@4): state machines not checked"; fi

sam-build: $(SAM_VENV)/.stamp $(LAMBDA)/.stamp ## package the functions into .aws-sam/build: make sam-build [ARCH=x86_64]
	ARCH=$(ARCH) $(SAM) build --parameter-overrides Architecture=$(ARCH)
	@du -sm $(LAMBDA) | awk '{print "one function, unzipped: " $$1 " MB (Lambda takes 250)"}'

deploy: sam-build ## create or update the stack (asks): make deploy STACK=name
	$(SAM) deploy --guided --stack-name $(STACK) --capabilities CAPABILITY_IAM CAPABILITY_AUTO_EXPAND

# All zip functions have the same content: made once, linked into what SAM uploads (infra/lambda/Makefile).
lambda-content: $(LAMBDA)/.stamp
	@cp -al $(LAMBDA)/. "$(ARTIFACTS_DIR)/" 2>/dev/null || cp -a $(LAMBDA)/. "$(ARTIFACTS_DIR)/"
	@rm -f "$(ARTIFACTS_DIR)/.stamp"

$(LAMBDA)/.stamp: infra/lambda/requirements.txt $(shell find engine handler -name '*.py' -newer $(LAMBDA)/.stamp 2>/dev/null | head -1)
	@rm -rf $(LAMBDA) && mkdir -p $(LAMBDA)
	@$(LAMBDA_INSTALL) --only-binary :all: --target $(LAMBDA) -r infra/lambda/requirements.txt
	@cd $(LAMBDA) && rm -rf faker Faker-* faker-* polyfactory polyfactory-* rich rich_click click pygments markdown_it mdurl numpy/f2py bin typing_tests
	@cd $(LAMBDA)/botocore/data && find . -mindepth 1 -maxdepth 1 -type d $(foreach name,$(BOTOCORE_KEPT),! -name $(name)) -exec rm -rf {} +
	@find $(LAMBDA) \( -name tests -o -name __pycache__ -o -name '*.py[ix]' -o -name '*.pxd' -o -name '*.[ch]' -o -name '*.[ch]pp' \) -prune -exec rm -rf {} +
	@cp -a engine handler $(LAMBDA)/
	@find $(LAMBDA)/engine $(LAMBDA)/handler -name __pycache__ -prune -exec rm -rf {} +
	@$(if $(findstring python,$(LAMBDA_BIN)),$(LAMBDA_BIN),uv run --quiet --no-project --python $(LAMBDA_BIN) python) -m compileall -q --invalidation-mode unchecked-hash -s $(LAMBDA) -p /var/task $(LAMBDA) \
		|| { echo "Python $(LAMBDA_PYTHON) is needed to compile the modules: without it every cold start would do it, 1.5 s"; exit 1; }
	@touch $@

$(SAM_VENV)/.stamp:
	@echo "setting up $(SAM_VENV): sam pins click, rich and boto3, so it has a place of its own"
	@mkdir -p build && $(PYTHON) -m venv $(SAM_VENV)
	@$(if $(shell command -v uv 2>/dev/null),uv pip install --quiet --python $(SAM_VENV)/bin/python,$(SAM_VENV)/bin/python -m pip install --quiet) 'aws-sam-cli>=1.170' 'cfn-lint>=1.58'
	@touch $@

# LocalStack wants Python 3.13 and the packages of its day: newer ones break it.
sfn-local: .stamp-sfn $(SAM_VENV)/.stamp ## run the state machines for real: LocalStack, Lambda processes, eight shards, a bulk build (Python 3.13, uv)
	@$(MAKE) --no-print-directory ARCH=x86_64 build/lambda-x86_64/.stamp
	$(BIN)/python infra/local/stepfunctions.py

.stamp-sfn: .stamp-dev
	@command -v uv >/dev/null || { echo "make sfn-local wants uv: LocalStack 4.14.0 needs packages as they were in February 2026 (--exclude-newer)"; exit 1; }
	@echo "setting up LocalStack 4.14.0 in build/venv-localstack, awslambdaric in build/venv-lambda"
	@uv venv --quiet --allow-existing --python $(LAMBDA_BIN) build/venv-localstack
	@uv pip install --quiet --python build/venv-localstack/bin/python --exclude-newer 2026-03-01 'localstack-core[runtime]==4.14.0'
	@uv venv --quiet --allow-existing --python $(LAMBDA_BIN) build/venv-lambda
	@uv pip install --quiet --python build/venv-lambda/bin/python 'awslambdaric>=4.2'
	@$(INSTALL) -e '.[aws]'
	@touch $@
