# Two commands, each alone on a fresh clone: `make gspo` and `make test`. They need Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: gspo test benchmark data notebooks

gspo: $(VENV)/ready
	$(BIN)/python RL_HAND/gspo/gspo.py

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

benchmark: $(VENV)/ready-dev
	$(BIN)/python benchmarks/step_against_trl.py

data: $(VENV)/ready
	$(BIN)/python data/build.py

notebooks: $(VENV)/ready-dev
	$(BIN)/python tools/notebooks.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("error: found Python %d.%d; expected 3.11 or newer: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
