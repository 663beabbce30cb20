# All the set-up on a fresh machine: Debian, Python >= 3.11, make. Nothing else is needed.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PARALLEL = --numprocesses auto --maxprocesses 4 --dist worksteal
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test coverage clean

demo: $(VENV)/.demo
	rm -rf runs/demo/runs        # a second demo replaces the first; its cache is used again
	$(BIN)/headstart demo --out runs/demo

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/pytest $(PARALLEL)

# The same tests, counted: tracing every branch nearly doubles their time. `eval` and the cache format must reach 95 % of
# their branches.
coverage: $(VENV)/.dev
	$(BIN)/pytest $(PARALLEL) --cov --cov-report=
	$(BIN)/coverage report --skip-covered --sort=cover
	$(BIN)/coverage json --quiet -o - | $(BIN)/python tests/benchmarks/branch_coverage.py

# Stamps: installed again only when what is pinned or declared has changed.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs caches
