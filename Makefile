PYTHON ?= python

help:  ## Lists the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

test:  ## Runs the tests.
	$(PYTHON) -m pytest

test-slow:  ## Runs the tests that take minutes; MEERKAT_GGUF names SmolLM2's GGUF file.
	$(PYTHON) -m pytest -m slow

check:  ## Format, lint, types.
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	rm -rf .types && $(PYTHON) -m pip install -q --no-deps --target .types . && \
		MYPYPATH=.types $(PYTHON) -m mypy; status=$$?; rm -rf .types build; exit $$status

format:  ## Formats the code.
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench:  ## Times a step beside its forwards, and compiles the kernels for three GPUs.
	$(PYTHON) -m meerkat_engine.bench.step
	$(PYTHON) -m meerkat_engine.bench.codegen

.PHONY: help test test-slow check format bench
