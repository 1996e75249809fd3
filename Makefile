# The commands of a checkout. PYTHON= chooses the interpreter, VENV= the virtual environment to make and use.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
REQUIREMENTS := pyproject.toml setup.py $(wildcard requirements/*.txt)
CONSTRAINED := -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help check-machine install install-dev quickstart test test-fast test-long parity gpu compare lint bench

help: ## say what each command does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

check-machine:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) is not on the PATH; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old, 3.11 or newer is needed; name another: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { \
	  echo "error: the headers of $(PYTHON) (Python.h) are missing, and DeepSpeed compiles against them; install them (Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)" >&2; exit 2; }
	@command -v $${CXX:-g++} >/dev/null || { \
	  echo "error: no C++ compiler ($${CXX:-g++}), and DeepSpeed compiles with it; install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)" >&2; exit 2; }

# A stamp in the environment says that it was installed from these requirements; a newer requirement file installs again.
# torch is installed first, because building DeepSpeed looks at it.
$(VENV)/.base-installed: $(REQUIREMENTS)
	@$(MAKE) --no-print-directory check-machine
	@echo "installing into $(VENV) (once; some minutes and, with the CPU build of torch, about 2 GB)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) $(CONSTRAINED) setuptools
	@$(PY) $(CONSTRAINED) torch
	@$(PY) $(CONSTRAINED) --no-build-isolation -e '.[data,eval,plot,tensorboard]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.base-installed
	@echo "installing the test tools into $(VENV), and compiling what the tests load"
	@$(PY) -m tests.compiled & compiling=$$!; \
	  $(PY) $(CONSTRAINED) --no-build-isolation -e '.[dev]' && \
	  $(PY) $(CONSTRAINED) --no-build-isolation --no-deps -r requirements/alone.txt; \
	  installed=$$?; wait $$compiling && exit $$installed
	@touch $@

install: $(VENV)/.base-installed ## make VENV and install what a run needs
install-dev: $(VENV)/.dev-installed ## the same with the test tools

quickstart: install ## prepare text, train, evaluate and sample a small model, 5 to 10 minutes on 2 cores
	@$(PY) tools/quickstart.py $(ARGS)

# Two processes share the tests, a file at a time; each test uses one thread a rank. Bytecode is kept whatever the
# environment says: dozens of launched runs would else compile the package again, each for half a second.
WORKERS ?= 2
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
FAST := tests/architecture tests/config tests/contracts tests/param_table tests/plan tests/launcher tests/kernels \
	tests/optim tests/metrics

test: install-dev ## run the test suite; WORKERS=8 on a machine with more cores
	@$(PYTEST) $(ARGS)

test-fast: install-dev ## run the tests of a minute: laws, configuration, plan, launcher, kernels, optimizers
	@$(PYTEST) $(FAST) --ignore=tests/kernels/triton $(ARGS)

test-long: install-dev ## run everything, also what takes minutes or fetches package data
	@$(PY) -m pytest -m "not gpu" $(ARGS)

parity: install-dev ## compare every parallel layout with one process, in a table; ROWS=0:40 for some of them
	@OMP_NUM_THREADS=1 $(PY) -m tests.parity.matrix $(ROWS)

gpu: install-dev ## on a machine with a GPU: its tests, then the speed of training
	@$(PY) -m pytest -m gpu tests/gpu $(ARGS)
	@$(PY) benchmarks/gpu.py --write docs/performance.md

compare: install-dev ## train 12 configurations here and at COMMIT=..., and ask for the same numbers to the last bit
	@$(PY) -m tests.compatibility.compare $(COMMIT)

lint: install-dev ## check style and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

bench: install ## measure the training step
	@$(PY) benchmarks/train_step.py $(ARGS)
