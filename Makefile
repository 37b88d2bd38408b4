# `make demo` and `make test` need Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test gpu lint clean

help:
	@echo "make demo    render clips, tokenise them, pretrain both stages, generate videos, enlarge them, write runs/demo/report (6 minutes on two idle cores)"
	@echo "make test    run all tests (12 minutes on two cores)"
	@echo "make gpu     with an NVIDIA GPU: kernels, their tests, sanitizers, benchmarks, all in runs/gpu/summary.md (1 to 3 hours, estimated)"
	@echo "make lint    check format, lint and types"
	@echo "make clean   remove .venv and build files; runs/ stays"
	@echo "PYTHON=python3.12 make ...   chooses the interpreter"

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: MegaVideo needs Python 3.11 or newer; name one, as PYTHON=python3.11 make"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/quickstart.sh

NVCC := $(shell command -v nvcc)

test: install
	@test -n "$(NVCC)" || echo "no nvcc: CUDA kernels run in their emulator, registers and spills go unchecked"
	$(BIN)/python -m pytest $(if $(NVCC),,-m "not nvcc")

gpu: install
	$(BIN)/python .ci/gpu.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
