# Every target works from a fresh clone: the virtual environment is made by the first one that needs it.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPP := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' '*.inl' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test long chaos quick lint format bench bench-peers parity picture export-networks browser ci soak clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Editable install with everything a developer needs, in $(VENV)

$(STAMP): pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[dev]'
	touch $@

demo: $(STAMP)  ## Explain five photographs; prints where the contact sheet is
	$(BIN)/shapleycam demo

test: $(STAMP)  ## The whole test suite, on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

long: $(STAMP)  ## The tests of minutes, of which the suite has a short form
	$(BIN)/python -m pytest -m long

chaos: $(STAMP)  ## kill -9 of the data-set job's driver, workers and Ray node at random moments, a hundred times
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/attribute

quick: $(STAMP)  ## Within a minute: the tests without the Triton interpreter, large networks and processes of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not interpreter and not gpu and not long"

lint: $(STAMP)  ## What CI checks: ruff, ruff format, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

format: $(STAMP)  ## Rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

bench: $(STAMP)  ## Explanation against forward pass and pytorch-grad-cam; writes bench/results/
	$(BIN)/python -m pytest bench/test_explain.py

bench-peers: $(STAMP)  ## pytorch-grad-cam, torch-cam and captum beside ours; resumable, writes bench/results/ and docs/peers.md
	$(BIN)/python -m bench.peers
soak: $(STAMP)  ## A minute of 128 clients at twice the capacity of a server
	$(BIN)/python -m tests.serve.soak --seconds 60 --clients 128

parity: $(STAMP)  ## Maps against pytorch-grad-cam's, torch-cam's and the formulas; writes docs/parity.md
	$(BIN)/python -m bench.parity

picture: $(STAMP)  ## Make docs/pictures/demo.jpg again
	$(BIN)/shapleycam demo --out shapleycam-out/picture
	cp shapleycam-out/picture/contact-sheet.jpg docs/pictures/demo.jpg

export-networks: $(STAMP)  ## Artefacts of real networks, compared and timed; writes docs/export-networks.md
	$(BIN)/python -m bench.export

browser: $(STAMP)  ## The browser example in headless Chromium against Python; needs Node.js and Chromium
	$(BIN)/python -m bench.browser

ci:  ## What a submission must pass, in environments of its own
	bash .ci/run

clean:  ## Remove what building and testing leave behind
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks shapleycam-out src/*.egg-info

-include Makefile.kernels
