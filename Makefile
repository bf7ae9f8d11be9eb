# Two commands for newcomers: `make demo` and `make test`. Both install into .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
STAMP := $(VENV)/.installed
LIBRARY := $(VENV)/.built

.PHONY: help install demo test test-slow lint format clean

help:
	@echo "make demo     train a small ThresholdNet on real digits (about a minute), draw what it learned"
	@echo "make test     linters, types and the whole test suite"
	@echo "make test-slow the rest: every engine test on the Triton backend in its interpreter (about an hour on 2 cores)"
	@echo "make install  only make .venv and install the package with its tools"
	@echo "make format   let ruff format the code"
	@echo "make clean    remove .venv, caches and runs/demo"

install: $(LIBRARY)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, got " \
		+ sys.version.split()[0] + "; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# The C++ library is compiled against the installed torch, so it is built once torch is there.
$(LIBRARY): $(STAMP) $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: install
	@rm -rf $(DEMO)
	$(BIN)/thresholdnet train --data digits --model thresholdnet_ab --model-arg width_mult=0.5 \
		--epochs 20 --batch-size 50 --lr 0.02 --seed 0 --out $(DEMO)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/test_engine.py \
		-k "triton and (opcheck or training_equals and (size0 or reference))"

test-slow: install
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --timeout 1800 tests/test_engine.py -k triton

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO) thresholdnet/_csrc* .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build dist
