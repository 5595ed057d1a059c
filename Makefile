# On a fresh machine with make and Python 3.11 or later, every target sets up .venv by itself.
#
#   make demo PYTHON=python3.12          another Python for a new .venv
#   make test BACKEND_EXTRA=jax          another backend: tensorflow, jax, torch
#   make test-gpu BACKEND_EXTRA=jax      the same, on a machine with a GPU
#   make test PYTEST_ARGS="-k frames"    anything for pytest
#   make bench BENCH_ARGS=--quick        anything for benchmarks/bench.py

PYTHON ?= python3
VENV ?= .venv
BACKEND_EXTRA ?= tensorflow-cpu
EXTRAS ?= test,dev,$(BACKEND_EXTRA)
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 300
SOAK_SECONDS ?= 600
ALL := not slow and not programs and not faults and not gpu
MARKS ?= $(ALL) and not more
# files of tests run side by side: much of the time goes into processes that start; 0 for one by one
TEST_PROCESSES ?= 2
# a hang ends here; on a quiet machine the tests take well under twelve minutes
TEST_SECONDS ?= 2400

# the same for everybody who tests and measures
PINS := $(if $(filter torch together bench,$(BACKEND_EXTRA)),torch==2.13.0)
# highest or lowest-direct: of what setup.cfg allows, by uv, for pip takes no oldest
RESOLUTION ?=
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
VERSIONS_BACKENDS ?= tensorflow jax torch

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(BACKEND_EXTRA)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# pip compiles one file after the other, and tests of what is installed: most of the time it takes
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib
UV := $(BIN)/python -m uv pip install --quiet --python $(BIN)/python --resolution $(RESOLUTION)

export TF_CPP_MIN_LOG_LEVEL ?= 2
# the backend that was installed, whatever a keras.json in the home folder says
export KERAS_BACKEND ?= $(firstword $(subst -, ,$(BACKEND_EXTRA)))

GPU_EXTRA := $(if $(filter torch,$(KERAS_BACKEND)),torch,$(KERAS_BACKEND)-gpu)
GPU_VENV := $(VENV)-gpu-$(KERAS_BACKEND)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo examples test test-more test-jax test-torch test-together test-dask-ml test-gpu \
  test-programs test-versions test-faults test-long fuzz soak lint format bench bench-all fidelity build clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the package, editable, and all that development needs

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or later is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing $(EXTRAS) into $(VENV): a minute or two, once"
	$(if $(RESOLUTION),$(PIP) uv)
	$(if $(RESOLUTION),$(UV),$(PIP) --no-compile) $(PINS) --editable '.[$(EXTRAS)]'
	@$(COMPILE) || true  # packages have templates of programs, too
	@touch $@

demo: $(INSTALLED) ## train and predict on two workers, check every bit, draw examples/output/demo.png
	$(BIN)/python examples/demo.py

examples: $(INSTALLED) ## run all examples but the notebook, three minutes; pictures go to examples/output
	@for script in examples/*.py; do \
	  if grep -Eq '^ *(import|from) dask_ml' $$script && ! $(BIN)/python -c 'import dask_ml' 2>/dev/null; \
	  then echo "$$script is left out: it needs dask-ml"; \
	  else echo "== $$script" && $(BIN)/python $$script || exit 1; fi; \
	done

test: $(INSTALLED) ## run the tests that take minutes together: of everything, on what is typical
	$(BIN)/python -m pytest -m "$(MARKS)" -n $(TEST_PROCESSES) --dist loadfile --session-timeout=$(TEST_SECONDS) $(PYTEST_ARGS)

test-more: ## run what `make test` leaves out of what the other backends' targets run: ten minutes
	$(MAKE) test MARKS="more and $(ALL)"

# most of the time goes into compiling the same for one more process
test-jax: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/build/jax
test-jax: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test-jax: ## run the tests on JAX, in an environment of its own
	$(MAKE) test BACKEND_EXTRA=jax VENV=$(VENV)-jax KERAS_BACKEND=jax MARKS="$(ALL) and not once"

test-torch: ## run the tests on PyTorch, in an environment of its own
	$(MAKE) test BACKEND_EXTRA=torch VENV=$(VENV)-torch KERAS_BACKEND=torch MARKS="$(ALL) and not once"

test-together: ## run the tests of changing backend, in an environment with all backends and KerasHub
	$(MAKE) test BACKEND_EXTRA=together VENV=$(VENV)-together KERAS_BACKEND=jax \
	  EXTRAS=test,together PYTEST_ARGS="tests/test_together.py --timeout=900"

# what dask-ml asks for stays out of the other environments
test-dask-ml: ## run the tests of dask-ml's searches, in an environment of its own
	$(MAKE) test VENV=$(VENV)-dask-ml KERAS_BACKEND=tensorflow MARKS="not gpu" \
	  EXTRAS=test,dask-ml,tensorflow-cpu \
	  PYTEST_ARGS="tests/test_dask_ml.py tests/test_search.py --timeout=600"

VERSIONS := EXTRAS=test,tensorflow-cpu,jax,torch
OLDEST := $(VERSIONS) BACKEND_EXTRA=oldest VENV=$(VENV)-oldest PYTHON=$(OLDEST_PYTHON) RESOLUTION=lowest-direct
NEWEST := $(VERSIONS) BACKEND_EXTRA=newest VENV=$(VENV)-newest PYTHON=$(NEWEST_PYTHON) RESOLUTION=highest

# dependencies of the oldest warn in newer ones of their own: only there warnings are no errors
test-versions: ## the tests on the oldest versions of all that setup.cfg allows, the newest, and both at once; 90 minutes
	$(MAKE) install $(OLDEST)
	$(MAKE) install $(NEWEST)
	for backend in $(VERSIONS_BACKENDS); do \
	  marks="$(ALL)"; test $$backend = $(firstword $(VERSIONS_BACKENDS)) || marks="$$marks and not once"; \
	  $(MAKE) test $(OLDEST) MARKS="$$marks" KERAS_BACKEND=$$backend PYTEST_ARGS="-W default $(PYTEST_ARGS)" \
	    OTHER_PYTHON=$(VENV)-newest/bin/python || exit 1; \
	  $(MAKE) test $(NEWEST) MARKS="$$marks" KERAS_BACKEND=$$backend OTHER_PYTHON=$(VENV)-oldest/bin/python || exit 1; \
	done

# the processes of these tests share a GPU: none may take most of it at once
test-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE = false
test-gpu: export TF_FORCE_GPU_ALLOW_GROWTH = true
test-gpu: ## run the tests and the benchmark that need a GPU, in an environment of its own
	$(MAKE) test BACKEND_EXTRA=$(GPU_EXTRA) VENV=$(GPU_VENV) EXTRAS=test,$(GPU_EXTRA) \
	  MARKS=gpu TEST_PROCESSES=0
	$(GPU_VENV)/bin/python benchmarks/gpu.py

test-programs: ## run examples, README's programs, commands, clusters of many kinds
	$(MAKE) test MARKS=programs

test-faults: ## end processes, fill a disk, cut a network in the middle of models on their way
	$(MAKE) test MARKS=faults TEST_PROCESSES=0

fuzz: ## fuzz the decoder for FUZZ_SECONDS, in an environment of its own
	$(MAKE) install VENV=$(VENV)-fuzz EXTRAS=test,fuzz,$(BACKEND_EXTRA)
	mkdir -p build/fuzz
	$(VENV)-fuzz/bin/python -m tests.fuzz -max_total_time=$(FUZZ_SECONDS) \
	  -max_len=4096 -timeout=15 -rss_limit_mb=8192 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/found- build/fuzz tests/corpus

soak: $(INSTALLED) ## send models through four workers for SOAK_SECONDS; fails if anything grows
	$(BIN)/python benchmarks/soak.py --seconds $(SOAK_SECONDS)

test-long: $(INSTALLED) ## run the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(INSTALLED) ## check style, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# what models are measured beside, ray for one, stays out of the other environments
bench: ## measure beside what people use instead, in an environment of its own, 15 minutes; fills in README.md
	$(MAKE) install BACKEND_EXTRA=bench VENV=$(VENV)-bench EXTRAS=bench KERAS_BACKEND=tensorflow
	$(VENV)-bench/bin/python benchmarks/bench.py $(BENCH_ARGS)

bench-all: ## the same with every workload and backend, and how costs grow; fills in docs/performance.md too
	$(MAKE) bench BENCH_ARGS=--all

fidelity: $(INSTALLED) ## compare every object after every route, and Keras's pickle; fills in docs/fidelity.md
	PYTHONPATH=. $(BIN)/python benchmarks/fidelity.py

build: $(INSTALLED) ## make dist/*.tar.gz and dist/*.whl
	$(BIN)/python -m build

clean: ## remove what the other targets made, .venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache \
	  dask-scratch-space examples/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
