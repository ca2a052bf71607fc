# Every target sets itself up first: a .venv in this folder, no root. `make PYTHON=/path/to/python3.12 ...`
# names the interpreter where the right one is not found.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup caption serve bench chaos scale evaluate test check docs clean

# The first that runs and fits: a name on the PATH may be a version manager's shim for one that is not there.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python; do \
  if $$name -c '$(FITS)' 2>/dev/null; then echo $$name; break; fi; done)
BIN := .venv/bin
READY := .venv/.complete
NOW := $(shell date -u +%Y%m%dT%H%M%SZ)
OUTPUT ?= output/$@/$(NOW)

# Small models on few cores: more threads than this fight each other.
export OMP_NUM_THREADS ?= 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv, or bring it up to date

$(READY): pyproject.toml constraints.txt
	@"$(or $(PYTHON),false)" -c '$(FITS)' \
	  || { echo "Python 3.11 to 3.13 is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	# torch alone first: pip then takes the CPU build where it finds one, and the default build elsewhere.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	# Beside the others: transformers imports torchao wherever it finds it, which takes half a second and
	# prints a page of warnings. The tests of quantised weights look here.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	  --target .venv/torchao torchao
	# lmms-eval wants a hundred packages, video decoders among them. These are what its evaluator imports.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	  --target .venv/lmms-eval lmms-eval accelerate colorama evaluate loguru lxml portalocker pytz \
	  sacrebleu tabulate
	# Beside the others: it pins an older version of the official client, which is tested as well.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/litellm \
	  litellm==1.103.7 openai==2.54.0 fastuuid==0.14.0 importlib-metadata==8.9.0 zipp==4.1.2 \
	  tiktoken==0.14.0 distro==1.9.0
	touch $@

caption: $(READY) ## caption the sample corpus with the embedded model; prints where the results are
	$(BIN)/python jobs/caption_corpus.py --input examples/scenes --model embedded --output $(OUTPUT)

serve: $(READY) ## answer OpenAI's API with the embedded model at http://127.0.0.1:8000
	$(BIN)/python jobs/serve.py --model embedded

test: $(READY) ## run every test; with CI=1 a skipped test is a failure
	$(BIN)/python -m pytest --timeout 600

check: $(READY) ## formatting, lint, types, and the layers of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

bench: $(READY) ## token budgets, engines and stages side by side, on the embedded model; into docs/results
	$(BIN)/python jobs/benchmark.py --model embedded --input examples/scenes \
	  --sections engine encoder stages --output docs/results

chaos: $(READY) ## kill captioning runs in 20 ways and compare keys; into docs/results
	$(BIN)/python jobs/chaos.py --rounds 20 --output docs/results

scale: $(READY) ## a million rows with models that cost nothing; into docs/results
	$(BIN)/python jobs/scale.py --rows 1000000 --output docs/results

evaluate: $(READY) ## every policy and budget on the drawn tasks, for an hour or more; into docs/results/accuracy
	$(BIN)/python jobs/evaluate.py --profile full

docs: $(READY) ## write docs/configuration.md and the README's figures anew
	$(BIN)/python -m pipeline.config > docs/configuration.md
	$(BIN)/python -m pipeline.metrics > docs/metrics.md
	$(BIN)/python -m pipeline.serve.options > docs/serving-options.md
	$(BIN)/python -m pipeline.metrics --grafana > docs/grafana.json
	$(BIN)/python jobs/write_figures.py

clean: ## remove .venv, caches and build products; output/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
