# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_RELEASE := torch==2.13.0
KERNELS := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(KERNELS) $(wildcard tests/cuda_emulator/*.cpp tests/cuda_emulator/*.h)

.PHONY: demo test test-all test-latest lock sanitize cuda-emulator sanitize-cuda cuda-check lint format bench experiments \
	experiments-full docs wheel wheel-check release-check clean

# Packages have the versions of requirements/*.txt (`make lock`). torch has none there: an installed one stays.
$(VENV)/demo: requirements/demo.txt setup.py pyproject.toml $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing packages'
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH_RELEASE) --constraint $<
	$(BIN)/pip install --quiet --requirement $<
	@echo 'compiling the kernels: about a minute of CPU time'
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
$(VENV)/%: requirements/%.txt | $(VENV)/demo
	$(BIN)/pip install --quiet --requirement $<
	touch $@

demo: $(VENV)/demo  ## the main job: meta-train on CartPole dynamics, adapt to unseen physics
	$(BIN)/eaml-ext --env_name CartPole-v1 --num_epochs 50 --overwrite

test: $(VENV)/test  ## the suite, the ops once more on their references, the CUDA kernels on the emulator
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 --reference tests/ops
	[ $$(uname) != Linux ] || $(MAKE) -j2 cuda-emulator

test-all: export PYTEST_ADDOPTS := -m ''
test-all: test  ## the tests marked exhaustive, too

# requirements/*.txt hold for Python 3.10 to 3.14 on every system. torch and its CUDA packages are no part of them;
# cuobjdump and nvdisasm, which torch does not need, are.
UV := build/lock/bin/uv
LOCK = echo $(TORCH_RELEASE) | $(UV) pip compile --quiet --universal --python-version 3.10 --no-python-downloads \
	--no-annotate --custom-compile-command 'make lock' --constraint -
WITHOUT_TORCH := sed -E -e '/^nvidia-cuda-(cuobjdump|nvdisasm)==/b' -e '/^(torch|triton|cuda-.*|nvidia-.*)==/d'
$(UV):
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv
lock: $(UV)  ## requirements/*.txt from the newest releases that pyproject.toml allows
	$(LOCK) pyproject.toml --extra dev > build/lock/test.txt
	$(LOCK) pyproject.toml --group build --extra plot --extra progress -c build/lock/test.txt > build/lock/demo.txt
	$(LOCK) pyproject.toml --extra docs -c build/lock/test.txt > build/lock/docs.txt
	$(LOCK) pyproject.toml --extra release -c build/lock/test.txt > build/lock/release.txt
	mkdir -p requirements
	for use in test demo docs release; do \
		$(WITHOUT_TORCH) build/lock/$$use.txt > requirements/$$use.txt || exit 1; done

# In an environment of its own that imports this folder, kernels included: it has the Python and the torch of $(VENV).
LATEST := $(VENV)-latest
LATEST_INSTALL := $(LATEST)/bin/pip install --quiet $(TORCH_RELEASE) --requirement
LATEST_CHECK := PYTHONPATH=$(CURDIR) $(LATEST)/bin/python tests/latest_check.py
REQUIREMENTS := $(BIN)/python tests/release_check.py --requirements
test-latest: $(VENV)/demo $(UV)  ## tests with the newest releases that pyproject.toml allows; names those that moved
	rm -rf $(LATEST)
	$(PYTHON) -m venv $(LATEST)
	$(LOCK) pyproject.toml --extra dev | $(WITHOUT_TORCH) > build/lock/latest.txt
	sed 's/,<[0-9.]*//g' pyproject.toml > build/lock/pyproject.toml
	@echo 'releases beyond the bounds of pyproject.toml:'
	@$(LOCK) build/lock/pyproject.toml --extra dev | $(WITHOUT_TORCH) | diff build/lock/latest.txt - | grep '^>' || echo none
	$(LATEST_INSTALL) build/lock/latest.txt
	$(REQUIREMENTS) bench | grep -E '^(higher|torchopt)' | $(LATEST_INSTALL) /dev/stdin
	$(LATEST_CHECK) --ignore=tests/ops --ignore=tests/cuda_emulator
	$(LATEST)/bin/pip uninstall --quiet --yes mujoco mujoco-core mujoco-studio  # metaworld needs MuJoCo 3, files of 4 break it
	$(REQUIREMENTS) metaworld | $(LATEST_INSTALL) /dev/stdin
	$(LATEST_CHECK) tests/tasks/test_metaworld.py tests/tasks/test_mujoco.py

# A package of its own in build/sanitize; gcc's runtime has to be loaded before Python's own allocations.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
RUNTIME = $(shell gcc -print-file-name=libasan.so):$(shell gcc -print-file-name=libubsan.so)
REPORT := log_path=$(abspath build/sanitize/report)
SANITIZED = cd build/sanitize && rm -f report.* && LD_PRELOAD=$(RUNTIME) ASAN_OPTIONS=detect_leaks=0:$(REPORT) \
	UBSAN_OPTIONS=print_stacktrace=1:$(REPORT) $(abspath $(BIN))/python
EVERY_KERNEL := float64 or strides or threads or few_channels or drawn or any_shape or extreme or non_finite or (vmap and not gradients)

# For this machine's instruction set alone, of the three that a build has: sanitized, each takes minutes.
sanitize: $(VENV)/test  ## the tests that reach every kernel, on kernels that stop at the first stray access
	PATH=$(abspath $(BIN)):$$PATH CXX=g++ CXXFLAGS="$(SANITIZE) -O1 -g1 -march=native -DEAML_NO_CLONES" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	find eaml_ext -name '*.py' -exec cp --parents {} build/sanitize ';'
	$(SANITIZED) -c 'from eaml_ext.ops import _library as used; assert "/build/sanitize/" in str(used.path) and not used.load_error'
	$(SANITIZED) -m pytest -x -n 2 -m '' --hypothesis-profile=few --ignore=../../tests/ops/test_build.py \
		-k '$(EVERY_KERNEL)' ../../tests/ops || { cat report.*; exit 1; }

# The CUDA kernels, compiled by the host compiler and run on an emulator of CUDA, for machines without a GPU.
EMULATOR := build/cuda_emulator
EMULATOR_FLAGS = -O1 -g1 -std=c++20 -fPIC -fno-math-errno -Wall -Wno-unknown-pragmas -Wno-psabi -U_FORTIFY_SOURCE \
	-fvisibility=hidden -DEAML_CUDA_EMULATOR -DTORCH_TARGET_VERSION=0x020b000000000000 -Icsrc -Itests/cuda_emulator \
	-isystem $(TORCH)/include
TORCH = $(shell $(BIN)/python -c 'import torch; print(torch.__path__[0])')
CUDA_SOURCES := $(wildcard tests/cuda_emulator/*.cpp csrc/*/op_common.cpp csrc/*/cuda/*.cpp csrc/*/cuda/*.cu)
EMULATOR_TESTS := close_to or numerical or half or strides or equals or extreme or drawn or exact or long or fault or \
	states or tiling or each_alone or each_row or limited or (rows_independent and (units or tails))
EMULATOR_SCAN := tests/cuda_emulator/test_emulator.py $(addprefix tests/ops/,test_scan_conformance.py \
	test_selective_scan.py test_selective_scan_step.py test_complex_scan.py test_packed_scan.py \
	test_scan_numerics.py::test_bits_of_rows_independent_of_batch_and_threads)
EMULATOR_CONV := tests/ops/test_causal_conv1d_conformance.py tests/ops/test_causal_conv1d.py
EMULATOR_KNN := exact_ or one_pass or slots_that or more_neighbors or close_to or strides or equals_ or dead or history

$(EMULATOR)/%.o: % | $(VENV)/test
	mkdir -p $(@D)
	g++ $(EMULATOR_FLAGS) $(EXTRA_FLAGS) -MMD -MP -x c++ -c $< -o $@
-include $(CUDA_SOURCES:%=$(EMULATOR)/%.d)
$(EMULATOR)/kernels.so: $(CUDA_SOURCES:%=$(EMULATOR)/%.o)
	g++ -shared $(EXTRA_FLAGS) $^ -o $@ -L$(TORCH)/lib -ltorch_cpu

KNN_TESTS := tests/cuda_emulator/test_knn_kernels.py tests/cuda_emulator/test_knn_one_pass.py \
	tests/ops/test_knn_conformance.py

cuda-emulator: $(EMULATOR)/kernels.so  ## the tests of the ops on their CUDA kernels, run on an emulator of CUDA
	$(BIN)/pytest -n 2 --cuda-emulator $< -k '$(EMULATOR_TESTS)' $(EMULATOR_SCAN)
	$(BIN)/pytest -n 2 -m '' --cuda-emulator $< -k '$(EMULATOR_TESTS) or reduced or bits' $(EMULATOR_CONV)
	$(BIN)/pytest -n 2 --cuda-emulator $< -k '$(EMULATOR_KNN)' $(KNN_TESTS) tests/ops/test_knn.py \
		tests/ops/test_packed_keys.py

sanitize-cuda: export EXTRA_FLAGS := $(SANITIZE)
sanitize-cuda:  ## the same under AddressSanitizer and UndefinedBehaviorSanitizer
	$(MAKE) EMULATOR=build/cuda_emulator_sanitized build/cuda_emulator_sanitized/kernels.so
	LD_PRELOAD=$(RUNTIME) ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest -x -n 2 -m '' --cuda-emulator build/cuda_emulator_sanitized/kernels.so \
		-k 'close_to or half or strides or long or exact_ or slots_that' $(EMULATOR_SCAN) $(EMULATOR_CONV) $(KNN_TESTS)

# About three minutes an architecture and core: TORCH_CUDA_ARCH_LIST=9.0 is enough between commits.
cuda-check: $(VENV)/test  ## compiles the CUDA kernels, loads them without a GPU, counts registers and instructions
	PATH=$(abspath $(BIN)):$$PATH FORCE_CUDA=1 $(BIN)/python tests/cuda_check.py build/cuda-check

# pre-commit lists files by git: outside a repository, as in an sdist, a temporary one in build/ serves.
lint: $(VENV)/test  ## the hooks of .pre-commit-config.yaml, without a network
	if ! git ls-files --error-unmatch .pre-commit-config.yaml > /dev/null 2>&1; then \
		mkdir -p build && export GIT_DIR=$(CURDIR)/build/lint.git GIT_WORK_TREE=$(CURDIR) && git init -q && git add --all || exit 1; \
	fi; PATH=$(abspath $(BIN)):$$PATH $(BIN)/pre-commit run --all-files

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

compile_commands.json: setup.py $(KERNELS) | $(VENV)/demo  ## how setup.py compiles each file of csrc, for clangd
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python setup.py -q build_ext --inplace --build-temp build/objects
	for part in _kernels _C; do $(BIN)/ninja -C build/objects/$$part -t compdb; done \
		| $(BIN)/python -c 'import sys; print(sys.stdin.read().replace("]\n[", ","))' > $@

bench: $(VENV)/demo  ## the kernel benchmarks in brief
	$(BIN)/python -m benchmarks.run --quick

# Files and plots in benchmarks/results, and docs/results.md made from them.
EXPERIMENTS := sinusoid noisy_sinusoid hidden_rotation switching_lds cartpole_rl switching_streams main_job_streams \
	dynamical_systems
experiments: $(VENV)/demo  ## every experiment on a small budget, one seed; minutes, writes no file
	OMP_NUM_THREADS=1 $(MAKE) -j2 $(EXPERIMENTS:%=brief-%)
brief-%: $(VENV)/demo
	$(BIN)/python -m benchmarks.experiments.$* --quick

experiments-full: $(VENV)/demo  ## every experiment in full: hours
	for name in $(EXPERIMENTS); do $(BIN)/python -m benchmarks.experiments.$$name || exit 1; done
	for name in main_job adaptation adaptation_step soak meta; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.results_page

docs: $(VENV)/docs  ## the site, in build/docs; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # not --quiet: it would not count warnings

# Without isolation: in an environment of its own, where no torch is, a wheel would be built without kernels.
BUILD := $(BIN)/python -m build --no-isolation --config-setting=--build-option=--portable
wheel: $(VENV)/release  ## dist/eaml_ext-*-py3-none-*.whl: the kernels for every Python 3
	rm -f dist/*.whl
	mkdir -p build
	$(BUILD) --wheel > build/wheel.log 2>&1 || { tail -n 40 build/wheel.log; exit 1; }

PYTHONS ?= $(BIN)/python
wheel-check: wheel  ## the tests of the ops on that wheel with each of PYTHONS, which have its requirements and pytest
	$(BIN)/python tests/wheel_check.py dist/*.whl $(PYTHONS)

release-check: $(VENV)/release docs  ## sdist and wheel in dist, looked into
	rm -rf dist
	$(BUILD) --sdist --wheel > build/release.log 2>&1 || { tail -n 40 build/release.log; exit 1; }
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/release_check.py dist

clean:
	rm -rf build dist *.egg-info eaml_ext/*.so runs
