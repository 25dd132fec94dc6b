# Two commands on a bare machine with Python 3.11+ and a C++ compiler:
#   make demo   set up, convert the bundled model, show the result
#   make test   set up, run every test
# TORCH names the PyTorch to install; any version from 2.6 on works.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
# Processes that run tests; each wants a core of its own and 3 GiB of memory.
WORKERS ?= 2
BIN    := $(VENV)/bin
MODEL  := tests/models/stdlib-qwen2moe-4m
OUT    := demo/stdlib-moe-alphaq.gguf

.PHONY: help setup plugin demo test lint docs clean

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== Installing PyTorch ($(TORCH))"
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@echo "== Installing alphaq-gguf. The first time llama-cpp-python is compiled: about 5 minutes without output."
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,torch-path,dev,report,eval,serve]'
	touch $@

# Without it everything works but files with a type per expert in llama.cpp.
plugin: setup
	-@$(BIN)/alphaq-gguf plugin build

demo: setup plugin
	@mkdir -p demo
	@echo "== Converting $(MODEL) to 3.5 bits per expert weight"
	$(BIN)/alphaq-gguf convert $(MODEL) -o $(OUT) --bpw 3.5 --modelfile --force
	@echo
	@echo "== Running it in llama.cpp"
	$(BIN)/alphaq-gguf run $(OUT) "What does json.dumps do?" --max-tokens 60 --temperature 0

test: setup plugin
	@echo "== Fetching llama.cpp's own converter, the oracle of some tests (they skip without it)"
	-$(BIN)/python tools/fetch_llama_cpp.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: setup
	$(BIN)/python tools/generate_cli_reference.py

clean:
	rm -rf demo build .pytest_cache .ruff_cache .hypothesis
