PYTHON ?= python
OUTPUT ?= gpu-results

help:  ## Lists the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

test:  ## Runs the tests.
	$(PYTHON) -m pytest -n auto --dist loadfile

test-slow:  ## Runs the tests that take minutes (extra frameworks); MEERKAT_GGUF names SmolLM2's GGUF file.
	$(PYTHON) -m pytest -m slow

coverage:  ## Runs the tests and shows which lines none of them reached.
	$(PYTHON) -m pytest -n auto --dist loadfile --cov --cov-report term-missing:skip-covered

fuzz:  ## Runs the fuzz tests fifty times as long, and the long kill tests: an hour.
	MEERKAT_FUZZ=50 $(PYTHON) -m pytest -s --timeout 3600 tests/fed/test_messages.py tests/fed/ledger/test_file.py \
		tests/engine/test_checksummed.py tests/engine/test_delta.py
	$(PYTHON) -m pytest -s -m slow tests/fed/run/test_resume.py

check:  ## Format, lint, types, and whether every import leads somewhere.
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pyright --pythonpath $$(command -v $(PYTHON))

format:  ## Formats the code.
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

test-gpu:  ## On a machine with a GPU: compares its bits with the CPU's.
	TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/test_gpu.py -m gpu -W default

gpu:  ## On a machine with a GPU: everything that ten minutes can tell, into OUTPUT (gpu-results). Needs no installation.
	PYTHONPATH=$(CURDIR)/.types $(PYTHON) -m meerkat_engine.bench.gpu --output $(OUTPUT)

bench:  ## Measures the kernels and the step against dense zeroth-order fine-tuning: a few minutes.
	$(PYTHON) -m meerkat_engine bench

codegen:  ## Compiles the kernels for three GPUs and records what came out.
	$(PYTHON) -m meerkat_engine.bench.codegen --output bench/results

.PHONY: help test test-slow coverage fuzz test-gpu gpu check format bench codegen
