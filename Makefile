# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test sanitize lint format bench clean

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

# A package of its own in build/sanitize; gcc's runtime has to be loaded before Python's own allocations.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
RUNTIME = $(shell gcc -print-file-name=libasan.so):$(shell gcc -print-file-name=libubsan.so)
REPORT := log_path=$(abspath build/sanitize/report)
SANITIZED = cd build/sanitize && rm -f report.* && LD_PRELOAD=$(RUNTIME) ASAN_OPTIONS=detect_leaks=0:$(REPORT) \
	UBSAN_OPTIONS=print_stacktrace=1:$(REPORT) $(abspath $(BIN))/python
EVERY_KERNEL := float64 or strides or threads or drawn or any_shape or extreme or non_finite or (vmap and not gradients)

# For this machine's instruction set alone, of the three that a build has: sanitized, each takes minutes.
sanitize: $(VENV)/installed  ## the tests that reach every kernel, on kernels that stop at the first stray access
	PATH=$(abspath $(BIN)):$$PATH CXX=g++ CXXFLAGS="$(SANITIZE) -O1 -g1 -march=native -DEAML_NO_CLONES" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	find eaml_ext -name '*.py' -exec cp --parents {} build/sanitize ';'
	$(SANITIZED) -c 'from eaml_ext import ops; assert "/build/sanitize/" in ops._C.__file__'
	$(SANITIZED) -m pytest -x -n 2 --hypothesis-profile=few --ignore=../../tests/ops/test_build.py \
		-k '$(EVERY_KERNEL)' ../../tests/ops || { cat report.*; exit 1; }

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
