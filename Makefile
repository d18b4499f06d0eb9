# `make demo` and `make test` need Python 3.11 or later and make; everything else lands in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# One thread a process: on two cores OpenMP threads of several processes fight each other (benchmarks/README.md).
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: env demo test test-quick lint bench ui clean
.DEFAULT_GOAL := env

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is not Python 3.11 or later; name one that is: make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies into $(VENV) (6.5 GB, one to eight minutes) ..."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[dev,server]"
	@touch $@

demo: env
	@$(BIN)/python jobs/compare.py scale=demo

test: env
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

test-quick: env
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadscope -m "not cluster and not e2e and not browser and not s3 and not postgres and not slow"

lint: env
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: env
	@$(BIN)/python -m benchmarks.cpu

ui: env
	@$(BIN)/python -m raysyn.tracking runs

clean:
	rm -rf $(VENV) runs
