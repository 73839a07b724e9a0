# Everything runs from .venv, which is rebuilt only when a dependency file changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# torchair ships in the wheel of torch_npu. Where there is no NPU the wheel must stay outside
# site-packages: torch and transformers would load it, and fail.
TORCH_NPU_VERSION := 2.13.0
TORCH_NPU := $(VENV)/share/rolemesh/torch_npu
TORCHAIR  := $(TORCH_NPU)/torch_npu-$(TORCH_NPU_VERSION).dist-info/METADATA

# Where to take torch from, when the default index has a build you do not want (see CONTRIBUTING.md).
TORCH_INDEX ?=
# Number of pytest workers. Two, because some tests start several ranks of their own.
WORKERS     ?= 2
# Further arguments for pytest, sweep and fuzz, e.g. make pytest ARGS="tests/passes -k matmul".
ARGS        ?=

.DEFAULT_GOAL := help
.PHONY: help venv browser demo test lint types pytest sweep fuzz man fmt bench clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) $(TORCHAIR) ## create or update .venv; instant when nothing changed

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# Only its absence makes it stale. Moved into place whole, so that an interrupted install leaves none.
$(TORCHAIR): | $(STAMP)
	rm -rf $(TORCH_NPU) $(TORCH_NPU).part
	$(BIN)/python -m pip install --quiet --no-deps --target $(TORCH_NPU).part torch-npu==$(TORCH_NPU_VERSION)
	mv $(TORCH_NPU).part $(TORCH_NPU)

demo: venv ## shard a small model for each role and compare with one device
	$(BIN)/python examples/demo.py

# The page of `rolemesh html` is tested in a real browser: any Chromium or Chrome on PATH, else one
# from the system's packages, else Playwright's own.
browser: $(STAMP) ## find a Chromium for the tests of the page, or install one
	@$(BIN)/python -m tests.browser

test: lint types pytest ## everything CI runs

lint: $(STAMP) ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy over the package
	$(BIN)/mypy

pytest: venv browser ## the tests alone; ARGS=... goes to pytest
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

sweep: venv ## check every architecture and rewrite docs/models.md; ARGS="--only llama" a part
	$(BIN)/python -m tests.coverage.sweep --jobs $(WORKERS) $(ARGS)
	$(BIN)/python -m pytest -m sweep tests/coverage

fuzz: venv ## 10,000 random programs with symbolic sizes, and new examples for property tests
	$(BIN)/python -m tests.passes.fuzz --jobs $(WORKERS) $(ARGS)
	$(BIN)/python -m pytest -n $(WORKERS) -m hypothesis --hypothesis-profile random

man: $(STAMP) ## rewrite docs/rolemesh.1, the manual page, from the parser
	$(BIN)/rolemesh completion man > docs/rolemesh.1

fmt: $(STAMP) ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv browser ## run every benchmarks/bench_*.py
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## remove build output and caches; .venv stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find compiler passes lowering runtime tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
