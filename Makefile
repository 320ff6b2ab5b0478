# One word each for what people do daily. CI calls exactly these.

SHELL := /bin/bash
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
RUN := .venv/bin
DATA ?= mnist
BESIDE = --numprocesses=$(or $(JOBS),3) --dist=loadfile --no-loadscope-reorder

# To compile TensorFlow's Python takes three times as long as to import it: only the first process is to do it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test test-fast check soak bench bench-model bench-checkpoint bench-recovery clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.tools/bin/uv: # only where there is no uv
	python3 -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

.PHONY: tools
tools: $(if $(findstring .tools,$(UV)),.tools/bin/uv)
	@for tool in g++ make cmake; do command -v $$tool >/dev/null || { \
	  echo "make setup: $$tool is missing, which builds Horovod; on Debian and Ubuntu: apt-get install g++ make cmake"; \
	  exit 1; }; done

setup: tools ## the locked environment in .venv, with Horovod built from its sources (some minutes the first time)
	$(UV) sync --frozen --all-extras --no-extra gpu

quickstart: setup ## train a small network on real digits on 2 workers (DATA=fashion-mnist: on 60,000 images)
	$(RUN)/python examples/mnist.py --data $(DATA)

test: setup ## the whole test suite, in three processes side by side (JOBS=1: one)
	$(RUN)/pytest $(BESIDE)

test-fast: setup ## what is worth running after every change
	$(RUN)/pytest $(BESIDE) -m "not slow"

check: setup ## ruff, mypy, the fences, links in Markdown
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/pytest -q tests/test_fences.py tests/test_docs.py

soak: setup ## kill runs 50 times (KILLS=8: fewer), then a fit's workers for half an hour (MINUTES=5), and compare
	$(RUN)/python tests/soak.py --kills $(or $(KILLS),50)
	$(RUN)/python tests/survival.py --minutes $(or $(MINUTES),30)

bench: tools ## time dtrain against plain Keras, Horovod and tf.distribute (about 40 minutes; BENCH=mlp: one row)
	$(UV) sync --frozen --all-extras --no-extra gpu --group bench
	$(RUN)/python -m benchmarks.suite $(BENCH)

bench-model: tools ## what a step costs on so many ranks: measured on 2 and 3, checked on 4, projected to thousands
	$(UV) sync --frozen --all-extras --no-extra gpu --group bench
	$(RUN)/python -m benchmarks.suite.model

bench-checkpoint: setup ## what checkpoints in the background, and deterministic=True, cost (about 10 minutes)
	$(RUN)/python benchmarks/checkpoint_cost.py

bench-recovery: setup ## how long the death of a worker holds up a fit, in each way to go on (about 6 minutes)
	$(RUN)/python benchmarks/recovery.py

clean: ## what building and running left here
	rm -rf .venv .tools .mypy_cache .pytest_cache .ruff_cache dtrain_runs
