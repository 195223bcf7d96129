# `make demo` and `make test` need Python 3.11+ and make, nothing else: each sets up .venv on its own.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-quick test-quantized lint bench clean

# The main job: train a stage on the embedded base and data, then load it where `poe` cannot be imported, and ask.
demo: $(READY)
	rm -rf runs/demo
	$(BIN)/poe-train stage demo --out runs/demo
	$(BIN)/python examples/load_without_poe.py runs/demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-quick: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# torchao prints warnings of its own wherever transformers is imported, so it is not among what every test needs.
test-quantized: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[quant]"
	$(BIN)/python -m pytest tests/test_quantized_bases.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell -D - -D .ci/words.txt

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/training_cpu.py
	$(BIN)/python benchmarks/siblings.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PoE needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
