# adapter-foundry: `make demo` runs the main job, `make test` passes the tests, `make up` runs the whole platform.
# Each sets everything up itself; all they need is Python 3.11 or newer with venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
RECIPE ?= trainer/recipes/pixelsmile-portraits.yaml
JOBS   ?= 2

# Container images often forbid bytecode, and installing writes none: without it each process compiles thousands of
# files anew, half a minute for one edit.
export PYTHONDONTWRITEBYTECODE :=

# One thread a process: the pictures are small, and the tests run $(JOBS) processes.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test up down status bench check docs audit sbom lock clean

help:  ## show these lines
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## create .venv and install everything at the locked versions

$(STAMP): pyproject.toml constraints.txt requirements-nodeps.txt
	@$(PYTHON) -c 'import sys, venv; sys.exit("adapter-foundry needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and pinned: whatever needs it later finds it there and fetches no other build
	$(PIP) install --quiet --no-compile torch==2.13.0
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-compile --no-deps --requirement requirements-nodeps.txt
	@touch $@

demo: setup  ## recipe -> trained, signed, promoted, pulled and used adapter, offline; SERVER=1: on what `make up` runs
	$(if $(SERVER),$(BIN)/python -m infra.local run --) $(BIN)/python -m flows.pipeline $(RECIPE)

test: setup  ## static checks and the whole test suite
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

up: setup  ## the whole platform on this machine: S3, MLflow, Prefect, a worker, serving; prints their addresses
	@$(BIN)/python -m infra.local up

down: setup  ## stop what `make up` started; all data stay
	@$(BIN)/python -m infra.local down

status: setup  ## what runs, since when, and where
	@$(BIN)/python -m infra.local status

bench: setup  ## every benchmark, one JSON line each (ratios against peers in the same run)
	@for bench in tests/bench/*.py; do PYTHONPATH=tests $(BIN)/python $$bench || exit 1; done

check: setup  ## ruff, mypy, import contracts, dead code, dependencies, infra files, docs
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/deptry .
	$(BIN)/python -m pytest -q -n $(JOBS) tests/infra tests/docs tests/test_architecture.py

docs: setup  ## the site of docs/ in site/, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

audit: setup  ## known vulnerabilities of the locked dependencies (asks PyPI)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

# The wheel as others install it, with all that runs, at the locked versions; what describes it stands beside it, not in it.
SBOM_PIP := build/sbom/tool/bin/python -m pip --disable-pip-version-check
sbom:  ## bill of materials of the wheel (WHEEL=file, or built here) with its runtime extras, CycloneDX JSON, in dist/
	rm -rf build/sbom
	mkdir -p build/sbom dist
	$(PYTHON) -m venv build/sbom/tool
	$(SBOM_PIP) install --quiet --constraint constraints.txt cyclonedx-bom
	$(if $(WHEEL),cp $(WHEEL) build/sbom,$(SBOM_PIP) wheel --quiet --no-deps --wheel-dir build/sbom .)
	$(PYTHON) -m venv --without-pip build/sbom/wheel
	$(SBOM_PIP) --python build/sbom/wheel install --quiet --no-compile --constraint constraints.txt "$$(ls build/sbom/*.whl)[runtime]"
	$(SBOM_PIP) --python build/sbom/wheel install --quiet --no-compile --no-deps --requirement requirements-nodeps.txt
	build/sbom/tool/bin/cyclonedx-py environment build/sbom/wheel/bin/python --pyproject pyproject.toml --mc-type library \
	    --output-reproducible --of JSON --output-file dist/sbom.cdx.json
	rm -rf build/sbom

lock: setup  ## write constraints.txt from what is installed now
	$(PIP) list --format=freeze --exclude adapter-foundry --exclude pip --exclude setuptools | sed -E 's/\+cpu$$//' > constraints.txt

clean:  ## remove the environment, builds and caches (data folders stay)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
