# make train: train, release and try the quickstart model.   make test: lint, types and all tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
# A GPU machine takes any torch in pyproject's range; a CPU machine the build that CI tests.
TORCH  ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

.PHONY: train test test-faults lint

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[log,dev]"
	touch $@

train: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tiny tensors, and files and commands side by side: more threads would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not faults" -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-faults: $(VENV)/.installed
	$(BIN)/pytest tests/faults
