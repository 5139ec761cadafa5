# `make help` lists the targets. Every target that needs Python packages installs them first, into .venv.

SCALE ?= demo
RUNS ?= runs
ARGS ?=
RESUME ?=

VENV := .venv
PY := $(VENV)/bin/python
# Changes when the dependencies change, so an old environment is brought up to date and a fresh one is left alone.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# An environment whose Python is gone, or of another machine, is made again.
ALIVE := $(shell [ ! -e $(STAMP) ] || $(PY) -c '' 2>/dev/null || rm -f $(STAMP))
TRAIN = $(PY) -m t2i_lm.train experiments/$(1).yaml --scale "$(SCALE)" $(if $(filter-out 0,$(RESUME)),--resume latest) run.dir="$(RUNS)" $(ARGS)

TEXT ?=
HELDOUT ?=
OTHER ?=
PRETRAIN = $(PY) -m t2i_lm.train experiments/text_lm.yaml data.path="$(TEXT)" data.val_path="$(HELDOUT)" run.dir="$(RUNS)/assets/$(1)" $(ARGS)
# An export overwrites nothing, so it goes to a new folder first.
EXPORT = rm -rf "$(RUNS)/assets/export" && $(PY) -m t2i_lm.export "$(RUNS)/assets/$(1)" --out "$(RUNS)/assets/export" \
  $(3) && \
  cp "$(RUNS)/assets/export/"* t2i_lm/assets/$(2)/
IMAGES = $(PY) -m t2i_lm.train experiments/$(1).yaml run.dir="$(RUNS)/assets" $(ARGS) && $(call EXPORT,$(1),$(1))

# Three processes, also on two cores: tests of several ranks wait. They share the files of tests, in the order that
# tests/conftest.py gives them. Their commands read the compiled modules of the first one.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PY) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# TensorBoard's page with the charts of the figures, without its smoothing.
DASHBOARD := \#custom_scalars&_smoothingWeight=0

.DEFAULT_GOAL := help
.PHONY: help setup check test all-tests test-quick test-faults docs architectures tensorboard screenshots figures study open-lm bench bench-gpu demo-assets exp-pretrained exp-scratch rehearsal clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  options: SCALE=demo|flickr8k|paper  RESUME=1  ARGS=\"key=value ...\"  PYTHON=python3.12"

setup: $(STAMP)  ## make .venv and install the suite with its test tools (done by the other targets too)

# Only the last line marks the installation as complete: an interrupted one is repeated.
$(STAMP): pyproject.toml constraints.txt
	@sh .ci/setup.sh "$(VENV)" "$(STAMP)" $(PYTHON)

check: $(STAMP)  ## format, lint, types and spelling
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

test: $(STAMP)  ## check and, beside it, all tests
	@$(MAKE) --no-print-directory --jobs 2 check all-tests

all-tests: $(STAMP)  ## all tests, without check
	$(PYTEST)

test-quick: $(STAMP)  ## the tests that train nothing (about a minute)
	$(PYTEST) -m "not slow"

exp-pretrained: $(STAMP)  ## text-to-image from the pre-trained language model (minutes on 2 cores)
	$(call TRAIN,t2i_pretrained)

exp-scratch: $(STAMP)  ## the same run from random weights
	$(call TRAIN,t2i_scratch)

figures: $(STAMP)  ## every figure whose runs exist, from the newest of each
	$(PY) -m t2i_lm.figures --runs "$(RUNS)" $(ARGS)

test-faults: $(STAMP)  ## kills, signals, full disks, damaged files and lost ranks in full numbers (15 to 30 minutes on two cores)
	T2I_LM_KILLS=200 T2I_LM_FAULTS=250 T2I_LM_RANKS=10 $(PYTEST) tests/faults tests/callbacks/files tests/callbacks/test_resume.py tests/callbacks/test_sharded_saves.py tests/callbacks/test_background_saves.py tests/storage/test_owner.py

rehearsal: $(STAMP)  ## the paper's run at its exact shapes with small parts, from tars to the report: ARGS="--quick"
	@$(PY) -m tests.rehearsal $(ARGS)

docs: $(STAMP)  ## docs/configuration.md from the docstrings of the config
	$(PY) -c "from t2i_lm.config.reference import write_reference; write_reference()"

study: $(STAMP)  ## every run of experiments/study.yaml that is missing, then relearning, probes, tables, figures, report.html: SEEDS=1 JOBS=2
	$(PY) -m t2i_lm.study experiments/study.yaml --jobs "$(or $(JOBS),1)" $(if $(SEEDS),--seeds "$(SEEDS)") run.dir="$(RUNS)" $(ARGS)

architectures: $(STAMP)  ## which architectures of transformers work, into docs/models.md (about 10 minutes)
	$(PY) -m tests.models.architectures $(ARGS)

tensorboard: $(STAMP)  ## dashboards of all runs in a browser (docs/dashboards.md)
	@echo "open http://localhost:6006/$(DASHBOARD)"
	$(VENV)/bin/tensorboard --logdir "$(RUNS)" --host localhost --port 6006

screenshots: $(STAMP)  ## docs/images of the dashboards and the web page (extra screenshots, and Chromium)
	$(PY) docs/screenshots.py "$(RUNS)" $(ARGS)

# No extra: upstream pins pandas 2.1.4, thus numpy below 2, which contradicts ours, and PyPI takes no dependency on git.
# Of its requirements its model uses torch, huggingface_hub and xformers, which the tests replace by a stub.
OPEN_LM_COMMIT := 9bb92ef1689333534b7057942a20d18a46d1fa52

open-lm: $(STAMP)  ## install mlfoundations/open_lm, which tests then compare with
	$(PY) -m pip install --no-deps "open_lm @ git+https://github.com/mlfoundations/open_lm@$(OPEN_LM_COMMIT)"

# A checkout of open_lm, to time its own training step beside ours, here and on a GPU.
OPEN_LM ?=

# One process each with a time limit; after a failure the others still run. ARGS="--only NAME" runs one.
bench: $(STAMP)  ## side by side with peers, JSON lines and a table (half an hour of an idle machine; OPEN_LM=CHECKOUT adds open_lm)
	@$(PY) -m benchmarks.suite $(if $(OPEN_LM),--open-lm "$(OPEN_LM)") $(ARGS)

bench-gpu: $(STAMP)  ## the same at the paper's shape on one GPU of 80 GB (meant for eight minutes)
	@$(PY) -m benchmarks.suite --gpu $(if $(OPEN_LM),--open-lm "$(OPEN_LM)") $(ARGS)

demo-assets: $(STAMP)  ## rebuild the shipped weights (hours): TEXT=books.txt.gz HELDOUT=heldout.txt.gz OTHER=wiki.txt.gz
	@test -f "$(TEXT)" && test -f "$(HELDOUT)" || \
	  { echo "error: give text: make demo-assets TEXT=books.txt.gz HELDOUT=heldout.txt.gz" >&2; exit 2; }
	$(call PRETRAIN,lm_rotary)
	$(call EXPORT,lm_rotary/text_lm,lm_rotary,$(if $(OTHER),--other-text "$(OTHER)"))
	$(call PRETRAIN,lm_head_rotary) backbone.positional=head_rotary text_tokenizer.path=asset:lm_rotary/text_tokenizer.model
	$(call EXPORT,lm_head_rotary/text_lm,lm_head_rotary,$(if $(OTHER),--other-text "$(OTHER)"))
	$(call IMAGES,image_tokenizer)
	$(call IMAGES,image_tokenizer_aligned)
	$(call IMAGES,image_tokenizer_words)

clean:  ## remove caches of tests and checkers (runs, figures and prepared data stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
