# kvlib and its book. `make help` lists the targets; the README explains them.

PYTHON ?= python3
VENV   ?= .venv
# Where pip may also look for torch: PyTorch's install page shows the index of the small CPU build
TORCH_INDEX ?=

PY     := $(VENV)/bin/python
# pip shows its progress on a terminal only
PIP    := $(PY) -m pip --disable-pip-version-check $(shell test -t 2 || echo -qq) install
READY  := $(VENV)/.installed
VENDOR := _vendor/.complete
NOTEBOOKS := $(sort $(wildcard chapters/*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help setup book test mutation notebooks lab bench quality lock clean

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) $(VENDOR)  ## Install everything (the other targets do this for you)

book: setup  ## Build the book into _build/html
	@$(PY) scripts/build_book.py

test: setup  ## Run every test: library, notebooks, book, browser
	@$(PY) -m pytest tests $(NOTEBOOKS) --nbval --nbval-current-env --nbval-cell-timeout=300

mutation: setup  ## Change kvlib in 320 places, one at a time, and count the changes that tests notice
	@$(PY) scripts/mutation.py --write

notebooks: setup  ## Re-execute the chapters in place and normalise what is stored
	@$(PY) scripts/refresh_notebooks.py $(NOTEBOOKS)

lab: setup  ## Open JupyterLab on the chapters
	@$(PY) -m jupyter lab --notebook-dir=. chapters

bench: setup  ## Print the table of CPU measurements
	@$(PY) benchmarks/cpu.py

quality: setup  ## Print the tables of what codecs and eviction cost the model
	@$(PY) benchmarks/quality.py
	@$(PY) benchmarks/structure.py

lock:  ## Resolve requirements.txt again and write requirements.lock
	@$(PYTHON) scripts/lock_requirements.py

clean:  ## Remove everything that was built or installed
	rm -rf $(VENV) _vendor _build build kvlib.egg-info .pytest_cache .hypothesis .ruff_cache

$(PY):
	@$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv $(VENV)

$(READY): requirements.lock pyproject.toml | $(PY)
	@echo "Installing $$(grep -c == requirements.lock) packages into $(VENV): some minutes the first time."
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENDOR): scripts/vendor.py _ext/widget_setup.js requirements.lock | $(READY)
	@$(PY) scripts/vendor.py
