PYTHON ?= python3.11
NPROC ?= 2
PROGRAMS ?= 20000
FILES ?= 200000
FIRST ?= 0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train verify test test-matrix programs fuzz format docs-picture clean

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

# The tests that depend most on torch itself, with the oldest torch that pyproject.toml allows and with the newest that pip
# finds, each in its own environment. CONTRIBUTING.md has the last result.
OLDEST_TORCH := 2.6
FAST_TESTS ?= tests/data tests/comm tests/gradients tests/batchnorm tests/checkpoint

test-matrix: test-torch-$(OLDEST_TORCH) test-torch-newest

test-torch-%:
	test -x .venv-torch-$*/bin/python || $(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip install --quiet --upgrade $(if $(filter newest,$*),torch,'torch==$*.*') --editable '.[test]'
	.venv-torch-$*/bin/pip list | grep -E '^(torch|numpy) '
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 .venv-torch-$*/bin/pytest -n 2 --dist loadfile $(FAST_TESTS)

# Random training programs against one process by hand (tests/gradients/programs.py), seeds FIRST to FIRST + PROGRAMS. The
# seeds that failed stand in the last line.
programs: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/python -W ignore -m tests.gradients.program_pool $(PROGRAMS) $(FIRST)

# Mutated checkpoints (tests/checkpoint/fuzz.py), seeds FIRST to FIRST + FILES.
fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.checkpoint.fuzz $(FILES) $(FIRST)

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

# The picture on docs/architecture.md, from the imports themselves.
docs-picture:
	$(PYTHON) docs/architecture.py

clean:
	rm -rf $(VENV) .venv-torch-* runs
