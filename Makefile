# Every target works as the first command after cloning: it makes .venv, installs with the tested
# versions (constraints.txt) and runs. Built again only where the sources of the native module or
# the dependencies changed; Python files are used where they are (an editable install).
#   PYTHON=python3.12 make test    HOS_CUDA=OFF make demo    HOS_CUDA_ARCHS="80-real;90" make wheel

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test full bench bench-quick bench-report gpu ptxas lint wheel asan clean
.PHONY: fuzz fuzz-files fuzz-native mutants kills hosts soak
.DEFAULT_GOAL := help

help:
	@echo "make demo         train on real digits, denoise, sample; report in demo/  (about 3 minutes)"
	@echo "make test         the tests"
	@echo "make full         the tests with the long ones"
	@echo "make bench        the benchmarks; their rows go to bench/results/cpu.csv  (half an hour)"
	@echo "make bench-quick  speed and memory beside what is recorded for this processor, in two minutes"
	@echo "make bench-report the recorded rows as tables and plots in bench/results"
	@echo "make gpu          on a machine with a GPU: build, tests, sanitizers, measurements (10 minutes)"
	@echo "make ptxas        registers and spills of the CUDA kernels; needs nvcc, no GPU"
	@echo "make lint         ruff, mypy, clang-format"
	@echo "make asan         the operator tests under AddressSanitizer and UBSan"
	@echo "make fuzz         wrong calls of the public API for ten minutes; counts go on"
	@echo "make fuzz-files   5,000 damaged files read; counts go on"
	@echo "make fuzz-native  the native module under libFuzzer for an hour; needs Clang 16 and atheris"
	@echo "make mutants      the mutants that have no result yet, or whose code has changed"
	@echo "make kills        SIGKILL at 100 random instants of the commands that write"
	@echo "make hosts        training and chains over hosts of network namespaces; needs root"
	@echo "make soak         long chains and long training, in shares of ten minutes"
	@echo "make wheel        dist/*.whl, with CUDA for all major GPUs where nvcc is found"
	@echo "make clean        remove what the others made"

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(READY): $(SOURCES) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

# Two processes, a file of tests each at a time.
SPREAD := -n 2 --dist loadfile

# Threads that wait do not spin: beside another busy process that costs more than the work.
demo test full asan kills hosts soak: export OMP_WAIT_POLICY ?= passive

demo: $(READY)
	$(BIN)/hos-ext demo --force

test: $(READY)
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

full: $(READY)
	$(BIN)/python -m pytest $(SPREAD)

bench: $(READY)
	$(BIN)/python -m pytest bench --record bench/results/cpu.csv

bench-quick: $(READY)
	$(BIN)/python -m bench.quick

bench-report: $(READY)
	$(BIN)/python -m bench.report --archive

# All that a GPU can show. Rows go to bench/results/gpu.csv, which `python -m bench.report` renders.
OPERATOR_TESTS := $(patsubst %,python_tests/ops/test_%.py,losses steps noise hessian)
SANITIZED := python_tests/ops/test_cuda.py -k "(cpu or fits or misaligned or empty or streams) and not forked"

gpu: | $(BIN)/python
	HOS_CUDA=ON $(PIP) install -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pytest python_tests/ops/test_cuda.py $(OPERATOR_TESTS)
	status=0; PATH="$$PATH:/usr/local/cuda/bin"; \
	for tool in memcheck racecheck initcheck synccheck; do \
	  echo "compute-sanitizer $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $$(test $$tool != memcheck || echo --report-api-errors no) \
	    $(BIN)/python -m pytest -q -x $(SANITIZED) || status=1; \
	done; \
	$(BIN)/python -m bench.gpu --record bench/results/gpu.csv || status=1; \
	$(BIN)/python -m bench.report bench/results/gpu.csv --out bench/results/gpu; exit $$status

ptxas: | $(BIN)/python
	$(BIN)/python -m bench.ptxas

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -type f)

# 80 A100, 86 RTX 30, 89 RTX 40 and L4, 90 H100, 100 B200, 120 RTX 50 and, as PTX, what follows.
wheel: $(BIN)/python
	HOS_CUDA_ARCHS="$${HOS_CUDA_ARCHS:-80-real;86-real;89-real;90-real;100-real;120}" \
	$(PIP) wheel -c constraints.txt --no-deps -w dist .

# The package once more, with an instrumented native module.
build/asan/ready: $(READY) $(shell find hos_ext -name "*.py")
	rm -rf build/asan/package
	HOS_CUDA=OFF HOS_SANITIZE=address,undefined $(PIP) install -c constraints.txt --no-deps \
	  --target build/asan/package --config-settings=install.strip=false .
	touch $@

# -S keeps away the hook of the editable install, which would come before PYTHONPATH.
asan: build/asan/ready
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH="$(CURDIR)/build/asan/package:$$(echo $(CURDIR)/.venv/lib/python3*/site-packages)" \
	$(BIN)/python -S $(BIN)/pytest -m "not slow" \
	  $(patsubst %,python_tests/ops/test_%.py,native_calls losses steps noise hessian)

# What keeps finding faults (docs/faults.md). Their counts are kept beside the programs.
fuzz: $(READY)
	$(BIN)/python python_tests/fuzz/api_fuzz.py --minutes 10

fuzz-files: $(READY)
	$(BIN)/python python_tests/fuzz/file_fuzz.py --files 5000

# atheris brings libFuzzer and the sanitizers' runtime; what it lacks is empty in the shim.
FUZZED := build/fuzz/module
fuzz-native: $(READY)
	$(PIP) install --no-deps atheris
	CXX=$${CXX:-clang++-16} cmake -S . -B $(FUZZED) -G Ninja -DHOS_CUDA=OFF \
	  -DHOS_SANITIZE=fuzzer-no-link,address,undefined -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build $(FUZZED)
	gcc -shared -fPIC python_tests/fuzz/shim.c -o $(FUZZED)/shim.so
	LD_PRELOAD="$$(echo $(CURDIR)/.venv/lib/python3*/site-packages/asan_with_fuzzer.so) $(CURDIR)/$(FUZZED)/shim.so" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH="$(CURDIR):$$(echo $(CURDIR)/.venv/lib/python3*/site-packages)" \
	$(BIN)/python -S python_tests/fuzz/native_fuzz.py --seconds 3600 --module $$(echo $(FUZZED)/_C*.so)

mutants: $(READY)
	$(BIN)/python python_tests/mutants/mutants.py

kills: $(READY)
	$(BIN)/python python_tests/faults/kill_trials.py --count 100 --seed 0 --record

hosts: $(READY)
	$(BIN)/python python_tests/faults/test_hosts.py python_tests/faults/hosts.json

soak: $(READY)
	$(BIN)/python python_tests/faults/soak.py --minutes 10

clean:
	rm -rf .venv build dist demo .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
