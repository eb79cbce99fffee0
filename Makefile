# Every target sets up .venv itself: Python 3.11 or newer is all that has to be there (the pinned versions need it).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Not compiled: most of the installed modules are never imported, and the rest is compiled when it is first imported.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
# Images for containers often set it. Every process would then compile what it imports of torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart horizon test test-slow lower-bounds lint format docs bench clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make quickstart   set up, then train and compare on the embedded text (minutes on two CPU cores)"
	@echo "make horizon      the same over four times the steps, on the embedded text or TEXT=file (up to an hour)"
	@echo "make test         set up, then run the tests (under 10 minutes); make test-slow: the long ones too"
	@echo "make lower-bounds  a short set of tests with the lowest declared version of every dependency (but torch)"
	@echo "make lint         ruff and mypy --strict;  make format: let ruff format"
	@echo "make docs         the documentation site, into site/; fails at a broken link or an undocumented public name"
	@echo "make bench        what things cost; each script writes a dated file to benchmarks/results"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e ".[dev]"
	@# curvlinops asks for backpack, and that for a torchvision that has to match torch's build: neither imports it here.
	$(BIN)/python $(PIP) -c constraints.txt --no-deps \
		curvlinops-for-pytorch backpack-for-pytorch unfoldNd
	@# The trainers whose own code reads what `blockwise-lr export` writes, in tests: only their optimizer settings run.
	@# Where one has no wheel, its test is skipped.
	$(BIN)/python $(PIP) -c constraints.txt --no-deps --only-binary :all: \
		torchtitan spmd_types torch_checkpointing torchdata nemo-automodel megatron-core axolotl \
		fairseq2 ruamel.yaml importlib_resources torcheval clusterscope tiktoken \
		ai2-olmo-core dataclass-extensions bettermap \
		|| echo "not installed: the trainers that read exported learning rates; their tests are skipped"
	@# timm imports torchvision, which PyPI has for CUDA alone. On the path of everything, it would break transformers.
	$(BIN)/python $(PIP) -c constraints.txt --no-deps --only-binary :all: --upgrade --target $(VENV)/vision \
		timm torchvision || echo "not installed: timm; its tests are skipped"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/blockwise-lr compare quickstart --out runs/compare-quickstart

# A pass over the embedded text, 2.5 million tokens. The baseline of twice the steps sees the text twice.
TEXT ?= sotu
horizon: $(READY)
	$(BIN)/blockwise-lr compare quickstart --steps 1200 --data "$(TEXT)" --arms adamw:uniform adamw:half \
		--base-lrs 2e-3 4e-3 8e-3 --out runs/compare-horizon

test: $(READY)
	@# One process a core; a file's tests stay together, for what they share. One thread each, or they would fight over cores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

# Half as many workers again as cores: these tests wait for processes of their own.
SLOW_WORKERS = $(shell expr \( $$(getconf _NPROCESSORS_ONLN) \* 3 + 1 \) / 2)
test-slow: $(READY)
	@# Only the files that have such tests, in the order of tests/conftest.py: the longest first.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(SLOW_WORKERS) --dist loadfile --no-loadscope-reorder --timeout 1200 \
		$$(grep -rl --include="test_*.py" "mark\.slow" tests | sort)

# torch as CI has it: its lowest wheel is a CUDA build of gigabytes. Another one: make lower-bounds TORCH=2.9.0
LOWER := .venv-lower
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
lower-bounds:
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(PYTHON) tools/lower_bounds.py > $(LOWER)/lower.txt
	$(LOWER)/bin/python $(PIP) --only-binary :all: \
		-r $(LOWER)/lower.txt torch==$(TORCH) pytest==9.2.0 pytest-timeout==2.4.0
	LOWER_BOUNDS=1 OMP_NUM_THREADS=1 PYTHONPATH=src $(LOWER)/bin/python -m pytest tests/test_lower_bounds.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The Python API is read from the sources, without importing them: mkdocs and its plugins are all that is installed.
DOCS_READY := $(VENV)/.docs-ready
$(DOCS_READY): $(READY)
	$(BIN)/python $(PIP) -c constraints.txt -e ".[docs]"
	touch $(DOCS_READY)

# All that lint, docs and the tests need, for `make --jobs`: what installs packages ends before what reads them begins.
.PHONY: ready
ready: $(DOCS_READY)

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/classify.py
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/split_forward.py
	$(BIN)/python benchmarks/train_throughput.py --repeats 3 --steps 80
	$(BIN)/python benchmarks/train_parts.py
	$(BIN)/python benchmarks/compile_start.py
	$(BIN)/python benchmarks/tokenizing.py
	$(BIN)/python benchmarks/sharpness.py
	$(BIN)/python benchmarks/sharpness_cost.py
	$(BIN)/python benchmarks/directional_cost.py
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) $(LOWER) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
