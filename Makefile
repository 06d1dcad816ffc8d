# The Python that makes .venv: 3.11 to 3.13, where every package of constraints.txt is to be had.
PYTHON ?= python3

VENV := .venv
INSTALLED := $(VENV)/.installed
INSTALLED_PEERS := $(VENV)/.installed-peers
INSTALLED_BROWSER := $(VENV)/.installed-browser
OLDEST := .venv-oldest
INSTALLED_OLDEST := $(OLDEST)/.installed

.DEFAULT_GOAL := help
.PHONY: help tutorial gifs examples models benchmark test test-all test-oldest test-browser lint format clean

help: ## List the targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- What the project makes ---

# Settings given to make are environment variables of the notebook:
# make tutorial DATASET=rings SEED=1 EPOCHS=50 OUTPUT_DIR=rings_images
tutorial: $(INSTALLED) ## Execute egm_dde.ipynb in place (settings: DATASET, SEED, EPOCHS, OUTPUT_DIR)
	$(VENV)/bin/python -m egm_dde.notebook egm_dde.ipynb

# In a folder of their own: make gifs DATASET=rings OUTPUT_DIR=rings_images
gifs: $(INSTALLED) ## Train on one data set and write its GIFs (settings: DATASET, SEED, EPOCHS, OUTPUT_DIR)
	$(VENV)/bin/python examples/train_models.py --gifs $(if $(DATASET),--dataset $(DATASET)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(OUTPUT_DIR),--output-dir "$(OUTPUT_DIR)")

# Settings as above; those of a notebook stand in its parameters cell: make examples STEPS=500 SEED=1
EXAMPLES ?= density_benchmark images your_data
examples: $(INSTALLED) ## Execute the notebooks in examples/ in place (half an hour; settings: EXAMPLES, STEPS, SEED)
	$(VENV)/bin/python -m egm_dde.notebook $(EXAMPLES:%=examples/%.ipynb)

models: $(INSTALLED) ## Train the ready-made models in example_models/ (ten minutes)
	$(VENV)/bin/python examples/train_models.py

# Some of them only: make benchmark BENCHMARKS="step_time scaling"
BENCHMARKS ?= step_time image_step_time scaling quality images ablation peers published_recipe
benchmark: $(INSTALLED) $(INSTALLED_PEERS) ## Run the benchmarks (several hours; settings: BENCHMARKS)
	@set -e; for name in $(BENCHMARKS); do \
	    echo "benchmarks/$$name.py"; $(VENV)/bin/python benchmarks/$$name.py; \
	done

# --- Checks ---

PYTEST_PARALLEL := -n auto --maxprocesses 4 --dist loadscope

test: $(INSTALLED) ## Run the fast tests (four minutes)
	$(VENV)/bin/python -m pytest -m "not slow and not browser" $(PYTEST_PARALLEL)

test-all: $(INSTALLED) ## Run all tests but those in a browser
	$(VENV)/bin/python -m pytest -m "not browser" $(PYTEST_PARALLEL)

# The method, its training and files, and the ready-made models: what an application depends on.
CORE := draws targets answers energy_models training files example_models
OLDEST_TESTS ?= $(wildcard $(CORE:%=tests/test_%.py))
test-oldest: $(INSTALLED_OLDEST) ## Run the core tests with the oldest versions of the packages (two minutes)
	$(OLDEST)/bin/python -m pytest -m "not slow" $(PYTEST_PARALLEL) $(OLDEST_TESTS)

# Selenium comes from PyPI, the browser from the system.
test-browser: $(INSTALLED) $(INSTALLED_BROWSER) ## Run the notebook in JupyterLab in Chromium (three minutes)
	@test -x /usr/bin/chromium && test -x /usr/bin/chromedriver || { \
	    echo "Chromium or its driver is missing: apt-get install chromium chromium-driver" >&2; exit 1; }
	$(VENV)/bin/python -m pytest -m browser

lint: $(INSTALLED) ## Check style and formatting of modules and notebooks
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: $(INSTALLED) ## Mend what can be mended by itself
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## Remove caches (the environments stay)
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# --- The environment ---

# pip is the last thing that venv writes, so an interrupted .venv is made again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	    echo "$(PYTHON) is not Python 3.11 to 3.13 ($$($(PYTHON) --version 2>&1)); name one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)

REQUIREMENTS := requirements-library.txt requirements-pictures.txt
$(INSTALLED): $(REQUIREMENTS) requirements-tables.txt requirements.txt tests/requirements.txt constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install --disable-pip-version-check \
	    -r requirements.txt -r tests/requirements.txt -c constraints.txt
	@touch $@

$(INSTALLED_PEERS): benchmarks/requirements.txt $(INSTALLED)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r benchmarks/requirements.txt -c constraints.txt
	@touch $@

$(INSTALLED_BROWSER): tests/requirements-browser.txt $(INSTALLED)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r tests/requirements-browser.txt -c constraints.txt
	@touch $@

$(OLDEST)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
	    echo "the oldest TensorFlow needs Python 3.10 to 3.12; name one: make test-oldest PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(OLDEST)

# The core tests write a GIF, too.
$(INSTALLED_OLDEST): $(REQUIREMENTS) constraints-oldest.txt | $(OLDEST)/bin/pip
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check \
	    $(REQUIREMENTS:%=-r %) pytest pytest-xdist hypothesis -c constraints-oldest.txt
	@touch $@
