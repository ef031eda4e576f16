# `make demo` and `make test` set everything up by themselves, on a machine with Python >= 3.11 and
# a C++ compiler. The gpu- targets use the Python that is already there, with its torch and Triton.

SYSTEM_PYTHON ?= python3
GPU_PYTHON ?= python3
PYTHON := .venv/bin/python
PIP_INSTALL := $(PYTHON) -m pip install --quiet --constraint constraints.txt
PYTEST_ARGS ?=

.PHONY: help
help:
	@echo "make demo       train a small model on bundled photographs, write demo/grid.png"
	@echo "make test       run the tests (PYTEST_ARGS='-k gram' narrows them)"
	@echo "make codegen    compile every Triton kernel for every capability, no GPU needed"
	@echo "make lint       ruff, mypy, import directions"
	@echo "make bench      CPU benchmarks, report and plots"
	@echo "make gpu-test   every test on a GPU, with compute-sanitizer (GPU_PYTHON=python3)"
	@echo "make gpu-bench  GPU benchmarks; PART=gram runs one family"
	@echo "make clean      remove .venv and everything built"

# --- Set-up -------------------------------------------------------------------------------------

.venv/.dependencies: constraints.txt
	$(SYSTEM_PYTHON) -m venv .venv
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) setuptools wheel ninja pybind11 numpy torch torchvision
	touch $@

.venv/.installed: .venv/.dependencies pyproject.toml setup.py $(wildcard csrc/*)
	$(PIP_INSTALL) --no-build-isolation --editable '.[train,export,demo,dev]'
	touch $@

.PHONY: setup
setup: .venv/.installed

.PHONY: clean
clean:
	rm -rf .venv build dist demo fastgan/_C*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache

# --- Everyday -----------------------------------------------------------------------------------

.PHONY: demo
demo: setup
	$(PYTHON) -m fastgan.cli demo

.PHONY: test
test: setup
	$(PYTHON) -m pytest --numprocesses auto $(PYTEST_ARGS)

# The tests compile each Triton kernel for one capability; this, each for all, 33,000 in all.
.PHONY: codegen
codegen: setup
	FASTGAN_CODEGEN=complete $(PYTHON) -m pytest tests/test_gram_codegen.py \
		tests/test_instance_norm_codegen.py

.PHONY: lint
lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-logo

# On a CPU, freed memory stays with the process: otherwise page faults of large results, the same for
# every implementation, would be much of what is timed, of the fastest most.
.PHONY: bench
bench: export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
bench: setup
	$(PYTHON) -m pytest $(BENCHES) --store $(PYTEST_ARGS); status=$$?; \
	$(PYTHON) benchmarks/report.py --readme && exit $$status

# --- On a GPU, with the Python, torch and Triton that are there ---------------------------------

.PHONY: gpu-install
gpu-install:
	$(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .

.PHONY: gpu-test
gpu-test: gpu-install
	$(GPU_PYTHON) tests/run_gpu.py

# Results go to benchmarks/results/<device>/<part>.json and are shown by benchmarks/RESULTS.md. A
# part is a benchmarks/bench_<part>.py; on a GPU one that was cut off goes on where it stopped.
PART ?=
BENCHES = benchmarks$(PART:%=/bench_%.py)

.PHONY: gpu-bench
gpu-bench: gpu-install
	$(GPU_PYTHON) -m pytest $(BENCHES) --store --resume $(PYTEST_ARGS); status=$$?; \
	$(GPU_PYTHON) benchmarks/report.py --readme && exit $$status
