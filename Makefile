# Every target but clean makes the environment first. Another Python that already has the packages: make test PY=python3
VENV   ?= .venv
PY     ?= $(VENV)/bin/python
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
OUT    ?= results/gpu
ARGS   ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

STAMP := $(VENV)/setup-done
# With a PY of the user's own nothing is installed, and the package is imported from src.
ifeq ($(PY),$(VENV)/bin/python)
READY := $(STAMP)
SMIDGEN := $(VENV)/bin/smidgen
else
SMIDGEN := $(PY) -m smidgen
export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))
GPU_ONLY := benchmarks/eight_gb.py

# $(call record,FOLDER,ARGUMENTS): run the scripts in $$scripts one after another; the last line of each is its record.
define record
mkdir -p "$(1)"
failed=""
for script in $$scripts; do
  name=$$(basename $$script .py)
  echo "== $$name"
  if $(PY) $$script $(2) | tee "$(1)/$$name.log" && tail -n 1 "$(1)/$$name.log" | $(PY) -m json.tool --indent 2 > "$(1)/$$name.tmp"; then
    mv "$(1)/$$name.tmp" "$(1)/$$name.json"
  else
    failed="$$failed $$name"
  fi
  rm -f "$(1)/$$name.tmp" "$(1)/$$name.log"
done
endef

.PHONY: help setup demo test check bench gpu docs clean

help:
	@echo "make setup   environment in $(VENV), pinned by constraints.txt (done once)"
	echo "make demo    offline tour of the embedded model"
	echo "make test    default tests; make test ARGS='-k noise -x' passes options on"
	echo "make check   lint, house rules, format, types, generated docs"
	echo "make bench   every benchmark that runs on a CPU, one record each in results/bench"
	echo "make gpu     tests and benchmarks that need a GPU, records in $(OUT)"
	echo "make docs    write the generated pages of docs/ again"
	echo "make clean   remove caches and built files"

setup: $(READY)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "smidgen needs Python 3.11 or later; name one: make setup PYTHON=/path/to/python3" >&2; exit 1; fi
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt pip
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --group dev -e .
	touch $@

demo: $(READY)
	@$(SMIDGEN) demo $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

check: $(READY)
	@$(PY) -m ruff check .
	$(PY) -m pytest -q -n 0 tests/test_project.py tests/test_layers.py
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) scripts/docs.py --check
	$(PY) scripts/zo_tables.py --check
	$(PY) scripts/dfo_tables.py --check
	$(PY) scripts/spiel_tables.py --check
	$(PY) scripts/speed_tables.py --check
	$(PY) scripts/velora_quality_tables.py --check
	$(PY) scripts/transfer_tables.py --check

# A goal missed is a figure in the record, never an error; a script that breaks is one, after all others have run.
bench: $(READY)
	@scripts="$(filter-out $(GPU_ONLY),$(BENCHMARKS))"
	$(call record,results/bench,)
	if [ -n "$$failed" ]; then echo "no record from:$$failed" >&2; exit 1; fi

# A benchmark has a GPU part when it takes --device; a test file, when it asks for a device.
gpu: $(READY)
	@$(PY) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a CUDA device; torch sees none")'
	mkdir -p "$(OUT)"
	scripts="$$(grep -l -e '--device' $(BENCHMARKS) || true)"
	$(call record,$(OUT),--device cuda)
	code=0
	$(PY) -m pytest -m "not slow" $$(grep -rl --include='test_*.py' 'cuda\.is_available' tests) $(ARGS) | tee "$(OUT)/tests.log" || code=$$?
	$(PY) -c 'import json, sys; print(json.dumps({"name": "gpu_tests", "exit": int(sys.argv[1]), "summary": sys.argv[2]}))' \
	  $$code "$$(tail -n 1 "$(OUT)/tests.log")" > "$(OUT)/tests.json"
	rm "$(OUT)/tests.log"
	if [ -n "$$failed" ]; then echo "no record from:$$failed" >&2; exit 1; fi
	exit $$code

docs: $(READY)
	@$(PY) scripts/docs.py
	$(PY) scripts/zo_tables.py
	$(PY) scripts/dfo_tables.py
	$(PY) scripts/spiel_tables.py
	$(PY) scripts/speed_tables.py
	$(PY) scripts/velora_quality_tables.py
	$(PY) scripts/transfer_tables.py

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
