# Two commands for newcomers: `make demo` and `make test`. Both install into .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
STAMP := $(VENV)/.installed
LIBRARY := $(VENV)/.built

.PHONY: help install demo test test-slow fuzz sanitize docs lint format wheel abi clean

help:
	@echo "make demo     train a small ThresholdNet on real digits (about a minute), draw what it learned"
	@echo "make test     linters, types and the whole test suite"
	@echo "make test-slow the rest: every engine test on the Triton backend in its interpreter (about an hour on 2 cores)"
	@echo "make fuzz     ten minutes of random blocks and operators with fresh seeds"
	@echo "make sanitize the C++ library and the emulated CUDA kernels under address and undefined-behaviour sanitizers"
	@echo "make docs     build the documentation into site/, the notebook executed"
	@echo "make install  only make .venv and install the package with its tools"
	@echo "make wheel    build sdist and wheel into dist/; install each in a new environment and test it there"
	@echo "make abi      run the wheel's C++ library in another torch, without a rebuild: make abi TORCH=2.13.0"
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
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/test_engine.py tests/test_replay.py \
		-k "triton and (opcheck or test_autocast or replays_are_equal or training_equals and (size0 or reference))"

fuzz: install
	THRESHOLDNET_FUZZ_MINUTES=10 $(BIN)/python -m pytest tests/test_fuzz.py

sanitize: install
	$(BIN)/python tests/sanitize.py

test-slow: install
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --timeout 1800 tests/test_engine.py tests/test_replay.py \
		-k triton

# The wheel is built from the sdist, so that a file missing there is noticed.
wheel: install
	rm -rf dist
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist dist/*.tar.gz
	tests/installed.sh $(BIN)/python dist/*.tar.gz
	tests/installed.sh $(BIN)/python dist/*.whl

TORCH ?= 2.13.0
abi: install
	rm -rf dist/abi
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist/abi .
	tests/abi.sh dist/abi/*.whl $(TORCH)

docs: install
	$(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO) thresholdnet/_csrc* .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build dist
