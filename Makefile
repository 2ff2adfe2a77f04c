# Everything a newcomer needs: `make demo` (the main job on a real brain) and `make test` (all tests).
# Needs Linux, Python 3.11–3.13 and make; all else is installed into .venv from pinned versions.
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; print(int((3, 11) <= sys.version_info < (3, 14)) or "")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test coverage check bench docs clean

demo: $(VENV)/.demo
	$(BIN)/isimed demo --out demo-out

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 --cov --cov-report=term

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.dev
	for script in scripts/make_*.py; do $(BIN)/python $$script || exit 1; done

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "isimed-index needs Python 3.11, 3.12 or 3.13; found none. Next: install one, or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
