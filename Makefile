# `make demo` and `make test` also set up the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.requirements-installed
DEMO := output/train/demo

.PHONY: help demo figures lint test mutants format bench bench-gpu

help:
	@echo "make demo    train a small spike-driven transformer on handwritten digits, then measure firing rates and energy"
	@echo "make test    check style and types, and run all tests"
	@echo "make mutants plant small faults in a copy of the program, and see whether the tests find them (many minutes)"
	@echo "make bench   measure speed and memory on the CPU, as ratios to the published computation (some minutes)"
	@echo "make bench-gpu  the same on a CUDA device, also with ImageNet sizes"
	@echo "make lint    check style and types only"
	@echo "make format  correct the style where that can be done automatically"
	@echo "make figures draw the pictures of the README and write the figures in docs/energy.md again"
	@echo "VENV=DIR and PYTHON=python3.12 choose the folder of the environment and the interpreter"

# Packages are installed again when a requirements file is newer than the last complete installation.
$(STAMP): requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] < (3, 15) else f"Python 3.11 to 3.14 is needed, this is {v[0]}.{v[1]}; give PYTHON=python3.12")'
	@$(PYTHON) -c 'import sys; v = sys.version_info; print(f"Python {v[0]}.{v[1]}: all packages exist for it, but this project was not tested with it") if v[:2] > (3, 12) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(STAMP)
	$(BIN)/python train.py -c conf/digits/1_64_15E_t4.yml --experiment demo
	$(BIN)/python firing_num.py -c conf/digits/1_64_15E_t4.yml --resume $(DEMO)/model_best.pth.tar \
		--attention-map 4 --verify

# Draws the pictures of the README, and writes the figures in docs/energy.md, from a run of the demo.
figures: demo
	$(BIN)/python firing_num.py -c conf/digits/1_64_15E_t4.yml --resume $(DEMO)/model_best.pth.tar \
		--attention-map 4 --verify --sweep-T 1 2 4 8
	$(BIN)/python -m benchmarks.docs_figures output/firing/demo/report.json
	cp $(DEMO)/curves.png imgs/demo_curves.png
	for name in firing energy ratio attention sweep; do cp output/firing/demo/$$name.png imgs/demo_$$name.png; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three processes, each with whole files of tests: many tests wait for child processes, which leaves cores free.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

mutants: $(STAMP)
	$(BIN)/python -m tests.mutants

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.train_step --device cpu --size cifar
	$(BIN)/python -m benchmarks.train_step --device cpu --size digits --rounds 9
	$(BIN)/python -m benchmarks.inference --device cpu --size cifar --no-memory
	$(BIN)/python -m benchmarks.inference --device cpu --size digits --rounds 9 --no-memory
	$(BIN)/python -m benchmarks.shares --device cpu --size cifar
	$(BIN)/python -m benchmarks.neuron --device cpu
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.spikingjelly2 --device cpu --size cifar
	$(BIN)/python -m benchmarks.spikingjelly2 --device cpu --size digits --rounds 9
	$(BIN)/python -m benchmarks.sparse_engine
	$(BIN)/python -m benchmarks.sparse_layer

# One call per size, and one of three parts of the work: each stays below ten minutes. Without a package index:
# INTERPRETER=python3 of an environment that has the packages, SPIKINGJELLY2="--python FILE" or "--folder FOLDER"
# for SpikingJelly 2.x (`python -m benchmarks.spikingjelly2 --prepare --folder FOLDER` elsewhere makes the folder).
SIZES ?= cifar imagenet-384 imagenet-512 imagenet-768
PARTS ?= check train evaluate theirs
INTERPRETER ?= $(BIN)/python
SPIKINGJELLY2 ?=

# First the golden tests on every backend, because the speed of a wrong result has no meaning. After that, what fails
# does not end the rest.
bench-gpu: $(if $(filter $(BIN)/python,$(INTERPRETER)),$(STAMP))
	failed=0; \
	if echo " $(PARTS) " | grep -q " check "; then \
	  $(INTERPRETER) -m pytest -m gpu || exit 1; \
	  for dtype in float32 float16 bfloat16; do \
	    $(INTERPRETER) -m benchmarks.neuron --device cuda --dtype $$dtype || failed=1; \
	  done; \
	fi; \
	for size in $(SIZES); do for part in $(PARTS); do case $$part in \
	train) \
	  $(INTERPRETER) -m benchmarks.shares --device cuda --size $$size --candidates plain:fp16 ours:bf16:nhwc || failed=1; \
	  $(INTERPRETER) -m benchmarks.train_step --device cuda --size $$size --rounds 9 --largest-batch \
	    --candidates plain:fp16:cupy ours:fp16:nhwc ours:bf16:nhwc ours:bf16:nhwc:graph ours:bf16:nhwc:cupy \
	    ours:bf16:nhwc:compile ours:bf16:nhwc:checkpoint || failed=1;; \
	evaluate) \
	  $(INTERPRETER) -m benchmarks.inference --device cuda --size $$size --rounds 9 --candidates plain:fp16:cupy \
	    ours:fp16:nhwc ours:bf16:nhwc:fuse ours:bf16:nhwc:fuse:compile || failed=1;; \
	theirs) \
	  $(INTERPRETER) -m benchmarks.spikingjelly2 --device cuda --size $$size --precision fp16 $(SPIKINGJELLY2) \
	    || failed=1; \
	  $(INTERPRETER) -m benchmarks.spikingjelly2 --device cuda --size $$size --precision fp16 --evaluation \
	    $(SPIKINGJELLY2) || failed=1;; \
	esac; done; done; exit $$failed
