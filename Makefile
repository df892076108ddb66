# Two commands are the promise: `make run` sets everything up and runs the main job, `make test` sets everything up and
# passes the tests. Both work in a fresh clone with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEVICE ?= auto

.PHONY: run test lint figures clean

run: $(VENV)/.installed
	$(BIN)/memprof run --model internvl2-2b --method baseline --method fastv --method topv --task ai2d \
		--device $(DEVICE) -o runs/ai2d --force
	$(BIN)/memprof plot runs/ai2d -o plots/mine

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every figure in plots/, and the numbers in README.
figures: $(VENV)/.installed
	$(BIN)/python scripts/make_figures.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memprof needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs plots/mine
