# Two commands are the promise: `make run` sets everything up and runs the main job, `make test` sets everything up and
# passes the tests. Both work in a fresh clone with Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEVICE ?= auto
# The transformers that the H200 and the H100 were recorded with, over everything else of the environment.
RECORDED_TRANSFORMERS := 5.17.0
REFERENCE := $(VENV)-reference
# The torch they were recorded with, under which they are held once more where its CPU wheel can be had.
RECORDED_TORCH := 2.11.0
OLDEST := $(VENV)-oldest
AUDIT := $(VENV)-audit

.PHONY: run test oldest audit lint figures site setup every fuzz kills clean

run: $(VENV)/.installed
	$(BIN)/memprof run --model internvl2-2b --method baseline --method fastv --method topv --task ai2d --stack paper \
		--device $(DEVICE) -o runs/first --force
	$(BIN)/memprof plot runs/first
	@echo "The picture: runs/first/figures/internvl2-2b_ai2d_paper_breakdown.png"
	@$(callable)

setup: $(VENV)/.installed
	@$(callable)

export OMP_NUM_THREADS := 1

test: $(VENV)/.installed $(REFERENCE)/.installed lint
	$(BIN)/python -m pytest -n 2 -rs
	PYTHONPATH=. $(REFERENCE)/bin/python -m pytest -n 2 -rs -p no:cacheprovider tests/analysis/test_references.py

# The references under the oldest torch as well: where its CPU wheel is out of reach, that is said, and is no failure.
oldest: $(REFERENCE)/.installed
	@if [ -e $(OLDEST)/.installed ] || $(MAKE) --no-print-directory $(OLDEST)/.installed; then \
		PYTHONPATH=. $(OLDEST)/bin/python -m pytest -n 2 -rs -p no:cacheprovider tests/analysis/test_references.py; \
	else echo "not tested under torch $(RECORDED_TORCH): its CPU wheel is out of reach"; fi

# Known vulnerabilities of what constraints.txt names; what no service in reach knows is said, and is no failure.
audit:
	@test -e $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
		$(AUDIT)/bin/python -m pip install --quiet pip-audit; } || echo "pip-audit is out of reach"
	@test ! -e $(AUDIT)/bin/pip-audit || $(AUDIT)/bin/python scripts/audit_constraints.py

# Every method on every family under every attention, every kind of prompt; `make test` has every two of them meet.
every: $(VENV)/.installed
	MEMPROF_EVERY=1 $(BIN)/python -m pytest -n 2 tests/pruning

# A hundred thousand damaged files, and kill -9 at fifty instants of `run` and of `tune`: hours, not minutes.
fuzz: $(VENV)/.installed
	MEMPROF_FUZZ=12000 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

kills: $(VENV)/.installed
	MEMPROF_KILLS=50 $(BIN)/python -m pytest tests/test_kills.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every figure in plots/, and the numbers in docs. What cards measured is predicted in the small environment.
figures: $(VENV)/.installed $(REFERENCE)/.installed
	PYTHONPATH=. $(BIN)/python scripts/make_figures.py --recorded-with $(REFERENCE)/bin/python

# The documentation site, in build/site.
site: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

callable = echo "memprof is set up. To call it from this shell:  source $(BIN)/activate"

# Without an NVIDIA card, torch is taken without CUDA's libraries, which are gigabytes: uv knows where such wheels are.
# Where it cannot reach them, pip takes what it finds.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memprof needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || { $(BIN)/python -m pip install --quiet uv && \
		UV_HTTP_RETRIES=0 $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu \
		"$$(grep '^torch==' constraints.txt)"; } || echo "torch's CPU wheel is out of reach; pip takes its own"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
	@$(callable)

$(REFERENCE)/.installed: $(VENV)/.installed Makefile
	$(PYTHON) -m venv $(REFERENCE)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
		> "$$($(REFERENCE)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	$(REFERENCE)/bin/python -m pip install --quiet transformers==$(RECORDED_TRANSFORMERS)
	touch $@

$(OLDEST)/.installed: $(REFERENCE)/.installed
	$(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -m pip install --quiet uv
	UV_HTTP_RETRIES=0 $(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --torch-backend cpu \
		torch==$(RECORDED_TORCH)
	cat $(REFERENCE)/lib/python3*/site-packages/shared.pth \
		> "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	$(OLDEST)/bin/python -m pip install --quiet transformers==$(RECORDED_TRANSFORMERS)
	touch $@

clean:
	rm -rf $(VENV) $(REFERENCE) $(OLDEST) $(AUDIT) runs
