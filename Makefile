# cptain: `make demo` and `make test` do all their own set-up, in .venv.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON        ?= python3
VENV          ?= .venv
TORCH         ?= torch==2.13.0
MEGATRON_CORE ?= megatron-core==0.19.2
PYTEST_ARGS   ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH         ?= preprocess

# The image (docs/image.md says what each is for).
include apptainer/pins.mk
IMAGE     ?= cptain.sif
SANDBOX   ?= cptain-sandbox
IMAGE_CPU ?= cptain-cpu.sif
BOOTSTRAP ?= docker
MEGATRON  ?=
IMAGE_GB  ?= 30
FORCE     ?=
# The one on PATH, or SingularityCE, else the private one that image-cpu and the tests install.
PRIVATE   := .apptainer
APPTAINER ?= $(or $(shell command -v apptainer),$(shell command -v singularity),$(PRIVATE)/bin/apptainer)
# How they reach apptainer/build.sh, and no other recipe: the tests run make again.
image sandbox image-cpu: export BASE := $(BASE)
image sandbox image-cpu: export BOOTSTRAP := $(BOOTSTRAP)
image sandbox image-cpu: export MEGATRON := $(MEGATRON)
image sandbox image-cpu: export MEGATRON_REPO := $(MEGATRON_REPO)
image sandbox image-cpu: export MEGATRON_REF := $(MEGATRON_REF)
image sandbox image-cpu: export IMAGE_GB := $(IMAGE_GB)
image sandbox image-cpu: export FORCE := $(FORCE)
image sandbox image-cpu jobs submit: export APPTAINER := $(APPTAINER)

# The jobs (docs/sites.md).
RUN       ?= runs/swallow-8b.toml
SITE      ?=
unexport RUN SITE IMAGE
JOBS       = apptainer/inside.sh '$(IMAGE)' cptain jobs '$(RUN)' $(if $(SITE),--site '$(SITE)')

.PHONY: help demo image sandbox image-cpu jobs submit test bench lint docs clean
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/ready  ## text and a tiny model, made on the spot, through the whole pipeline on the CPU
	$(VENV)/bin/python runs/demo.py

image:  ## cptain.sif, from NGC's PyTorch and Megatron-LM (docs/image.md has the variables)
	@apptainer/build.sh '$(IMAGE)'

sandbox:  ## the same as a writable folder, cptain-sandbox
	@apptainer/build.sh --sandbox '$(SANDBOX)'

# The same recipe, on a base that needs no container registry, with PyPI's Megatron; a BASE given to make is taken.
image-cpu: export MEGATRON := $(or $(MEGATRON),$(MEGATRON_CORE))
image-cpu: export IMAGE_GB := 2
ifeq ($(filter command environment,$(firstword $(origin BASE))),)
image-cpu: export BOOTSTRAP := localimage
image-cpu: export BASE := $(PRIVATE)/base
image-cpu: $(PRIVATE)/base
endif
image-cpu: $(filter $(PRIVATE)/%,$(APPTAINER))  ## cptain-cpu.sif, for machines without a GPU
	@apptainer/build.sh '$(IMAGE_CPU)'

jobs:  ## job scripts for RUN=run.toml, and SITE=name if not jobs.site; runs in the image
	@$(JOBS)

submit:  ## the same, then submits them
	@submit=$$($(JOBS)) && bash "$$submit"

$(PRIVATE)/bin/apptainer: apptainer/install.sh apptainer/apt.sh
	apptainer/install.sh $(PRIVATE)
	@touch $@

$(PRIVATE)/base: apptainer/base.sh apptainer/apt.sh
	apptainer/base.sh $@
	@touch $@

test: lint  ## every test, with the real Megatron-LM
	$(VENV)/bin/pytest $(PYTEST_ARGS)

bench: $(VENV)/ready  ## the table of docs/benchmarks.md that BENCH='preprocess [options]' names
	$(VENV)/bin/pip install --quiet tiktoken wordfreq
	$(VENV)/bin/pip install --quiet --no-deps llama-models==0.3.0
	$(VENV)/bin/python bench/$(firstword $(BENCH)).py $(wordlist 2,$(words $(BENCH)),$(BENCH))

lint: $(VENV)/ready  ## format, lint and types
	$(VENV)/bin/ruff format --check --quiet
	$(VENV)/bin/ruff check --quiet
	$(VENV)/bin/mypy

docs: $(VENV)/ready  ## docs/cli.md, from the program
	$(VENV)/bin/python docs/cli.py

clean:  ## remove the venv and the demo
	rm -rf $(VENV) demo

# pip in minutes that would be silent: a line for each package of 10 MB or more as its download begins, and one before
# they are unpacked. Errors are pip's own.
PIP_SAYS = sed -unE 's/^ *(Downloading|Using cached) ([^ ]*\/)?([^- ]+-[^- ]+)-[^ ]*\.whl \(([0-9]{2,}\.?[0-9]* MB|[0-9.]+ GB)\).*/  \3, \4/p; \
  s/^Installing collected packages: .*/  unpacking/p'
PIP      = $(VENV)/bin/pip install --disable-pip-version-check --progress-bar off

# PyPI's megatron-core asks for Python 3.12 in its metadata and has wheels for 3.11, which run: hence its two options.
# Of what it depends on, only what GPT training imports is installed.
$(VENV)/ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "cptain needs Python 3.11 or later; this is $$($(PYTHON) --version). Try make PYTHON=python3.11" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) with what it needs, then cptain's own packages, into $(VENV): minutes, and some GB"
	@set -o pipefail; $(PIP) '$(TORCH)' | $(PIP_SAYS)
	@set -o pipefail; $(PIP) --editable '.[torch,parquet,sentencepiece,eval,wandb,png,dev]' | $(PIP_SAYS)
	@set -o pipefail; $(PIP) --no-deps --ignore-requires-python '$(MEGATRON_CORE)' | $(PIP_SAYS)
	@touch $@
