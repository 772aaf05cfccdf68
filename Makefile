# Two commands do everything from a bare clone: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(wildcard csrc/include/*.h csrc/cpu/*/*)
# Sleeping OpenMP threads: spinning ones starve each other on a busy machine (a training step took 12 times as long).
export OMP_WAIT_POLICY ?= PASSIVE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Tests on every core, each process with one thread and up to a GiB; who has no test left takes half of another's.
WORKERS := --numprocesses=logical --maxprocesses=8 --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench sweep peers faults matrix triton native cuda sanitize arm wheel clean

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.train ## fine-tune a small language model with QLoRA, with a before and after (4 minutes)
	$(BIN)/python -m examples.demo $(ARGS)

# ISA=avx2: torch, oneDNN and lora_ops as on a CPU without AVX-512. Inductor keeps its cache apart, or it would take
# kernels for AVX-512 from it, which leave most of the result unwritten then (findings/).
AS_AVX2 := LORA_OPS_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2
test: $(VENV)/.test lint ## lint, types and every test (10 minutes); ISA=avx2: as on a CPU without AVX-512
	HF_HUB_OFFLINE=1 $(if $(filter avx2,$(ISA)),$(AS_AVX2)) $(BIN)/python -m pytest $(WORKERS) --durations=20 $(ARGS)

lint: $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench ## time every op against dense torch, PEFT, bitsandbytes and torchao; writes bench/results/
	$(BIN)/python -m bench $(ARGS)

sweep: $(VENV)/.test ## inject every family of transformers, tiny, against stock PEFT; writes docs/sweep.md (10 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep $(ARGS)

peers: $(VENV)/.test ## PEFT's own offline LoRA tests with inject behind its API (30 minutes)
	$(BIN)/python -m tests.peers $(ARGS)

faults: $(VENV)/.test ## kill a paged training 200 times at random moments and check what it left (a minute)
	$(BIN)/python -m tests.optim.crash --rounds 200

matrix: $(VENV)/.test ## test the oldest and newest releases allowed, compile with every Triton; writes docs/matrix.md (hours)
	$(BIN)/python -m tests.matrix $(ARGS) -- $(WORKERS)

# The oldest Triton that is supported, beside the installed one and not in its place.
TRITON ?= 3.6.0
triton: $(VENV)/.test ## test and compile the Triton kernels with TRITON=3.6.0, or another version (30 minutes)
	test -d build/triton-$(TRITON) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest tests/gpu_proof/test_interpreted.py tests/gpu_proof/test_decode_ptx.py $(ARGS)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m tests.gpu_proof.gate --check

native: $(VENV)/.test ## build the C++ kernels in place
	$(BIN)/python setup.py --quiet build_ext --inplace

cuda: $(VENV)/.test ## build the CUDA C++ kernels in place, with nvcc (a minute)
	LORA_OPS_BUILD_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
sanitize: $(VENV)/.test ## fuzz the C++ kernels under the address and undefined-behaviour sanitizers (3 minutes)
	CXXFLAGS="-O1 $(SANITIZE)" LDFLAGS="$(SANITIZE)" LORA_OPS_REQUIRE_NATIVE=1 \
	  $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	$${CXX:-c++} -std=c++17 -O1 -Wall -Wextra $(SANITIZE) -Icsrc/include tests/csrc/fuzz/fuzz.cpp \
	  build/sanitize/lora_ops/_liblora_ops.so -Wl,-rpath,$(CURDIR)/build/sanitize/lora_ops -o build/sanitize/fuzz
	build/sanitize/fuzz $(ARGS)

arm: $(VENV)/.test ## build the C++ kernels for 64-bit ARM and test them under qemu (4 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.arm $(ARGS)

# The tools are in an environment of their own: the tests' is not to change by what a release is made with.
TOOLS := build/wheel/tools
wheel: $(TOOLS)/.done ## build the sdist and the manylinux wheel into dist/, try both without a compiler (5 minutes)
	$(TOOLS)/bin/python -m tests.wheel

$(TOOLS)/.done: tests/wheel/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/wheel/tools.txt
	@touch $@

clean: ## delete the environment and what was built
	rm -rf $(VENV) build dist *.egg-info lora_ops/_liblora_ops*.so demo_output

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lora_ops needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# An editable install of the checkout with the extra of the same name; again when the build files or csrc change.
$(VENV)/.train $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: pyproject.toml setup.py constraints.txt $(CSRC) | $(BIN)/python
	@echo "installing lora_ops[$*] into $(VENV) (a minute or two the first time)"
	$(PIP) --editable ".[$*]"
	@touch $@
