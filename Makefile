# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint format bench clean

$(VENV)/installed: pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## the main job: meta-train on CartPole dynamics, adapt to unseen physics
	$(BIN)/eaml-ext --env_name CartPole-v1 --num_epochs 50

test: $(VENV)/installed  ## the whole suite, then the ops once more on their references
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 --reference tests/ops

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: $(VENV)/installed  ## the kernel benchmarks in brief
	$(BIN)/python -m benchmarks.run --quick

clean:
	rm -rf build dist *.egg-info eaml_ext/*.so runs $(VENV)/installed
