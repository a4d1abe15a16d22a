# make demo   train the tiny preset on real images through the deepspeed launcher, generate, print where to look
# make test   every CPU test except the slow ones and those in a browser
# make test-browser   the panel, driven in Chromium (installed as Debian's package where possible)
# make test-slow  the tests that take minutes; make soak  the fault tests that take hours, which resume where they were stopped
# make grid   keep a reference's style, follow words: trains the tiny preset on five icon sets and measures it; 25 minutes; needs
#             npm, or GRID_SETS=DIR with SET/icons.json and SET/info.json
# Each makes a virtual environment (.venv) the first time; after that nothing is installed.
#
# On a machine with an NVIDIA GPU:
# make gpu-first OUT=DIR  ten minutes of measurements on one GPU, the most valuable first; needs torch, triton, diffusers,
#                 transformers; run again, it measures what is missing. SMALL=1: sizes for a CPU
# make gpu-check  are the kernels correct, and how fast are they; 10 minutes; needs torch, triton, diffusers, transformers, pytest
# make gpu-bench  every arm and shape into runs/gpu-bench/*.json; run again, it measures what is missing
# make gpu-train  FLUX.1-dev's sizes through DeepSpeed: 20 updates, saved and resumed; needs all of `make install`
PYTHON ?= python3
VENV := .venv
GPU_PYTHON ?= python3
GPU_BENCH ?= runs/gpu-bench
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
unexport PYTHONPATH

# The benches install nothing: they use what GPU_PYTHON has, and this folder.
GPU := PYTHONPATH=.:kernels:$(PYTHONPATH) $(GPU_PYTHON)
MAIN_ARMS := diffusers-eager,diffusers-eager-full,ours-none,ours-mlp
# 484 condition tokens, as for a square picture in training.
STEP := -m megaflux.bench step --text 484

.NOTPARALLEL:
.PHONY: install demo grid test test-browser test-slow soak lint clean gpu gpu-first gpu-check gpu-bench gpu-train

# Everything, for the tests and the panel.
install: $(VENV)/.installed

# A stamp is at least as new as setup.py only if setup.py's requirements have been installed.
$(VENV)/.installed: setup.py
	$(call into_venv,demo test,3 GB)

# What `make demo` and `make grid` need: neither the panel nor the tests' browser.
$(VENV)/.installed-demo: setup.py
	$(call into_venv,demo,2 GB)

define into_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed $(VENV)/.installed-demo
	@echo "installing into $(VENV) (about $(2), a minute or more) ..."
	@$(VENV)/bin/python launch/install.py $(1)
	@touch $@
endef

demo: $(VENV)/.installed$(if $(wildcard $(VENV)/.installed),,-demo)
	python launch/demo.py

grid: $(VENV)/.installed$(if $(wildcard $(VENV)/.installed),,-demo)
	python launch/grid.py $(if $(GRID_SETS),--sets "$(GRID_SETS)")

# Whole training runs take most of the time, so an idle worker takes the next test.
test: install
	python -m pytest tests -n 2 --dist worksteal -m "not slow and not gpu and not browser" -q

# Debian's chromium, installed here if run as root on Debian; elsewhere install it yourself.
test-browser: install
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  echo "installing Debian's chromium ..." && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  { echo "error: no chromium; install it (on Debian: apt-get install chromium)" >&2; exit 2; }
	python -m pytest tests/panel -m browser -q

test-slow: install
	python -m pytest tests -m slow -q

soak: install
	python -m tests.soak

lint: install
	ruff check .
	ruff format --check .
	mypy

gpu:
	@$(GPU) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null || \
	  { echo "error: no NVIDIA GPU that the torch of $(GPU_PYTHON) can use; GPU_PYTHON=... names another python" >&2; exit 2; }

# Every part runs, whatever the earlier ones found, and leaves a file in GPU_BENCH; the exit code is the worst of all.
# With pytest-xdist the kernels' tests run 8 at a time (otherwise Triton compiles for one after the other); with pytest-timeout
# a test that hangs ends after 3 minutes. Tests of training need the GPU to themselves.
gpu-check: gpu
	@mkdir -p $(GPU_BENCH)
	@export PYTHONPATH=.:kernels:$(PYTHONPATH); rc=0; \
	run() { echo "$$ $$*"; "$$@" || { code=$$?; [ $$code -le $$rc ] || rc=$$code; }; }; \
	has() { $(GPU_PYTHON) -c "import $$1" 2>/dev/null; }; \
	limit=; if has pytest_timeout; then limit="--timeout 180"; fi; \
	workers=; if has xdist; then workers="-n 8"; fi; \
	run $(GPU_PYTHON) -m pytest tests/kernels tests/models/test_flux.py --ignore tests/kernels/test_aot.py -m "not slow" -q \
	  $$workers $$limit --junitxml $(GPU_BENCH)/junit-kernels.xml; \
	if has "deepspeed, streaming"; \
	  then run $(GPU_PYTHON) -m pytest tests/training/test_gpu.py tests/training/test_waits.py -m gpu -q \
	    --junitxml $(GPU_BENCH)/junit-training.xml; \
	  else echo "no deepspeed or streaming here: engines, plans of memory and waits are not checked (tests/training, -m gpu)"; fi; \
	run $(GPU_PYTHON) -m megaflux_kernels.bench --json $(GPU_BENCH)/check-kernels.json; \
	run $(GPU_PYTHON) $(STEP) --grids 64x64 --arms $(MAIN_ARMS) --json $(GPU_BENCH)/check-step.json; \
	exit $$rc

# One command per part, each under 10 minutes, each with its own file; --resume skips what the file holds. cuDNN comes last: before
# 9.15.1 it is wrong at 4096 + 484 tokens and is refused, which ends make.
gpu-bench: gpu
	@mkdir -p $(GPU_BENCH)
	$(GPU) -m megaflux_kernels.bench --resume --json $(GPU_BENCH)/kernels.json
	$(GPU) -m megaflux.bench activations --resume --json $(GPU_BENCH)/activations.json
	$(GPU) $(STEP) --resume --grids 64x64 --json $(GPU_BENCH)/step-64x64.json
	$(GPU) $(STEP) --resume --grids 36x64 --json $(GPU_BENCH)/step-36x64.json
	$(GPU) $(STEP) --resume --grids 27x64 --json $(GPU_BENCH)/step-27x64.json
	$(GPU) $(STEP) --resume --grids 64x64 --arms $(MAIN_ARMS) --components block --json $(GPU_BENCH)/step-64x64-block.json
	$(GPU) $(STEP) --resume --grids 64x64 --arms $(MAIN_ARMS) --attention cudnn --json $(GPU_BENCH)/step-64x64-cudnn.json

# Needs no installation if torch, triton, transformers and diffusers are present. WORK: for runs of the training loop, 30 GB.
gpu-first: $(if $(filter-out 0,$(SMALL)),,gpu)
	@test -n "$(OUT)" || { echo "error: OUT=DIR is missing: the folder for the results" >&2; exit 2; }
	@$(GPU) -c 'import torch, transformers, diffusers' || \
	  { echo "error: $(GPU_PYTHON) lacks one of torch, transformers, diffusers; make install, or GPU_PYTHON=..." >&2; exit 2; }
	$(GPU) -m megaflux.bench.first --out "$(OUT)" $(if $(filter-out 0,$(SMALL)),--small) $(if $(WORK),--work "$(WORK)") \
	  $(if $(STEPS),--steps $(STEPS)) $(if $(AGAIN),--again $(AGAIN)) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

gpu-train: install gpu
	python launch/gpu_train.py

clean:
	rm -rf runs data build *.egg-info
