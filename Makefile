# Two commands do all the set-up on a fresh machine with Python 3.11:
#   make demo   the main job on the shipped model
#   make test   the test suite
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEV := $(shell sed -n '/^dev = \[/,/^\]/s/^ *\("[^"]*"\),*$$/\1/p' pyproject.toml)

.PHONY: demo test lint types notebooks notebooks-test clean

# torch goes first and alone: with it in place nothing asks for another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e . $(EXTRA)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(DEV)
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/sd-lens report tiny --out sd-lens-report.html --json sd-lens-report.json

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

# Runs notebooks/*.py and writes the .ipynb beside each (needs Chromium, for the pictures); NOTEBOOKS=notebooks/01_quickstart.py for one alone.
notebooks: $(VENV)/.installed-dev
	$(BIN)/python -m notebooks.publishing $(NOTEBOOKS)

notebooks-test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=180 -n auto notebooks

clean:
	rm -rf $(VENV) .venv-tl3 sd-lens-report.html sd-lens-report.json
