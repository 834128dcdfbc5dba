PYTHON ?= python3.11
NPROC ?= 2
PROGRAMS ?= 20000
FILES ?= 200000
FIRST ?= 0
MODULES ?=
SAMPLE ?= 25
VENV := .venv
BIN := $(VENV)/bin

WAIT_S ?= 75

.PHONY: train verify test test-matrix programs mutants waits scale fuzz audit-corpus damage rechecks release-check format docs docs-look docs-notebook docs-picture docs-terminal clean

train: $(VENV)/.installed-examples
	$(BIN)/ddparity train examples/digits.py --nproc $(NPROC)

verify: $(VENV)/.installed-examples
	$(BIN)/ddparity verify examples/digits.py --world-sizes 1,2,3,4 --reduction strict --steps 100

# Three files at a time: much of a test of processes is waiting. torch's store asks the name server for the name of each
# address, 127.0.0.1 too; a lost answer would cost 5 s.
test: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/pytest -n 3 --dist loadfile

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
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 TORCH_CPP_LOG_LEVEL=ERROR \
		$(BIN)/python -W ignore -m tests.gradients.program_pool $(PROGRAMS) $(FIRST)

# Whether a test fails if the core is changed: tests/mutants.py, for the modules of tests/mutants.toml, or for
# MODULES=data/plan.py, or MODULES='data comm'. SAMPLE=1000 tries every mutant.
mutants: $(VENV)/.installed-test $(VENV)/.installed-mutants
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/python -m tests.mutants $(MODULES) --sample $(SAMPLE)

# Healthy waits of WAIT_S seconds, which the launcher may not end, and real hangs, which it must name: 12 minutes.
waits: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/python -m tests.launcher.wait_matrix $(WAIT_S)

# Jobs of up to 1,024 ranks, simulated, and what 200 launches of 32 processes leave behind: 20 minutes, into
# benchmarks/RESULTS.md.
scale: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/python benchmarks/scale.py

# All faulty and clean scripts of tests/auditing through the audit, also those that take long; `make test` runs some.
audit-corpus: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/python -m tests.auditing.cases

# Mutated checkpoints (tests/checkpoint/fuzz.py), seeds FIRST to FIRST + FILES.
fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.checkpoint.fuzz $(FILES) $(FIRST)

# Random damage to directories of predictions, in full. The figures go to benchmarks/RESULTS.md.
damage: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.inference.damage

# Rechecks of healthy ranks, RECHECKS of them: none may give an alarm. The figures go to benchmarks/RESULTS.md.
RECHECKS ?= 10000
rechecks: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 RES_OPTIONS=timeout:1 $(BIN)/python -W ignore -m tests.gradients.faults $(RECHECKS)

# Whether a release would work: tests/release.py. It needs 7 GB of disk, and a quarter of an hour.
release-check:
	OMP_NUM_THREADS=1 $(PYTHON) tests/release.py

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

# The documentation, as a site in site/, in Chinese in site/zh/: a broken link or reference fails. It needs no network,
# neither to build nor to read; `python -m http.server -d site` serves it. With --quiet, MkDocs would not count warnings.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file mkdocs.zh.yml

# What pages show of the source: the picture of the imports, and the options of the commands.
docs-picture: $(VENV)/.installed-test
	$(BIN)/python docs/architecture.py
	$(BIN)/python docs/commands.py

# What the cells of examples/notebook.ipynb print and draw, from a real kernel: a minute.
docs-notebook: $(VENV)/.installed-notebook
	$(BIN)/python docs/notebook.py

# The pictures of the README, from real runs: a minute.
docs-terminal: $(VENV)/.installed-examples
	$(BIN)/python docs/terminal.py

# Photographs of the site by Chromium, at the widths of a desk and of a phone, light and dark, into site/look: errors in
# the console, and pages that are wider than the window, fail.
docs-look: docs
	$(BIN)/python docs/look.py

clean:
	rm -rf $(VENV) .venv-torch-* runs site
