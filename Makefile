PYTHON ?= python3.11
NPROC ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train verify test format clean

train: $(VENV)/.installed-examples
	$(BIN)/ddparity train examples/digits.py --nproc $(NPROC)

verify: $(VENV)/.installed-examples
	$(BIN)/ddparity verify examples/digits.py --world-sizes 1,2,3,4 --reduction strict --steps 100

# Two files at a time: much of a test of processes is waiting. torch's store asks the name server for the name of each
# address, 127.0.0.1 too; a lost answer would cost 5 s.
test: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/pytest -n 2 --dist loadfile

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs
