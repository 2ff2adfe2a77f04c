# Everything a newcomer needs: `make demo` (the main job on a real brain) and `make test` (all tests).
# Needs Linux, Python 3.11–3.13 and make; all else is installed into .venv from pinned versions.
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; print(int((3, 11) <= sys.version_info < (3, 14)) or "")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin

# A file at a time, in the order of the names: by xdist's own order the files with few tests, the longest, would end the run.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: demo test thorough coverage check bench docs clean

demo: $(VENV)/.demo
	$(BIN)/isimed demo --out demo-out

test: $(VENV)/.dev
	$(PYTEST)

# What `make test` samples, all of it or more: crashes, damage, kills, readers, walks. Long.
thorough: $(VENV)/.dev
	ISIMED_REPLAY=all ISIMED_DAMAGE=all ISIMED_KILLS=500 ISIMED_COMMITS=200 ISIMED_STEPS=20000 $(PYTEST) --timeout 0 \
		tests/store/test_replay.py tests/store/test_damage.py tests/store/test_kills.py tests/store/test_readers.py \
		tests/store/test_state_machine.py tests/test_power_loss.py

coverage: $(VENV)/.dev
	$(PYTEST) --cov --cov-report=term

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
