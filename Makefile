# Each target does its own set-up in .venv. PYTHON chooses the interpreter, PIP_ARGS goes to pip (an index, say).
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
GRAPHOPT := $(BIN)/graphopt

.PHONY: demo test quick lint pictures replicate sweep coverage fuzz chaos bench gpu gpu-packages clean docs

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The entry points are read at installation: a new pass in pyproject.toml makes these stale.
.venv/.installed: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e .
	touch $@

.venv/.installed-test: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[test]"
	touch $@ .venv/.installed

# The main job on real data, start to finish: look, rewrite, train, export, load the ordinary model. A minute or two on two cores.
demo: .venv/.installed
	rm -rf runs/demo runs/demo-plan
	$(GRAPHOPT) inspect quickstart
	$(GRAPHOPT) apply quickstart --epoch 4 -o runs/demo-plan
	$(GRAPHOPT) train quickstart -o runs/demo
	$(GRAPHOPT) export runs/demo -o runs/demo.safetensors
	$(BIN)/python -c "from graphopt.models import cifar_resnet as cifar; from safetensors.torch import load_file; \
	  print(cifar.build('resnet20', in_chans=1).load_state_dict(load_file('runs/demo.safetensors'), strict=True), 'the untouched ResNet-20')"

# The README's pictures, from real specs.
pictures: .venv/.installed-test
	$(BIN)/python tools/pictures.py

# The documentation site, in build/site; a warning or a link that leads nowhere is an error.
docs: pyproject.toml | .venv/.installed
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What CI runs: style, types and layers first, then every test.
# Bytecode is written whatever the user has set: each of the many processes would compile the package again.
test: lint
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n auto --dist worksteal --durations=25 $(PYTEST)

# Without the slow tests.
quick: .venv/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(PYTEST)

# mypy does not follow the installer's mapping of folders: links put passes/ and specs/ where they are installed.
lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/graphopt
	ln -s $(CURDIR)/graphopt/* $(CURDIR)/passes $(CURDIR)/specs build/types/graphopt/
	MYPYPATH=build/types $(BIN)/mypy -p graphopt
	MYPYPATH=build/types:tools $(BIN)/mypy --config-file tools/mypy.toml tools/*.py
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_layers.py

# Every classification backbone of torchvision and one per timm file, at its own size: traced bit for bit.
sweep: .venv/.installed
	$(BIN)/python tools/trace_sweep.py --out tools/tables/trace_sweep.md

# Every published figure of the four systems beside ours, each with its spec and its command. Some minutes.
replicate: .venv/.installed
	$(BIN)/python tools/replicate.py --out tools/tables/replicate.md

# Backbones of many kinds, libraries' and user-written ones: what traces, what each pass makes of it, forecasts and exports.
coverage: .venv/.installed-test
	$(BIN)/python tools/coverage.py --resume --out tools/tables/coverage.md

# Specs changed and passes drawn at random, runs killed at every system call, bits flipped: no traceback, no hang, no silent damage. A failing case is reduced and kept as a test.
fuzz: .venv/.installed
	$(BIN)/python tools/fuzz_specs.py --out tools/tables/fuzz_specs.md
	$(BIN)/python tools/fuzz_passes.py --out tools/tables/fuzz.md
	$(BIN)/python tools/fuzz_files.py --out tools/tables/fuzz_files.md

# Fifty times a rank of a run is killed, and torchrun starts all ranks again: every run ends as if nothing had happened.
chaos: .venv/.installed
	$(BIN)/python tools/chaos.py --out tools/tables/chaos.md

# The ratios that people wait for, against the table's last row: fails where one is worse by more than a fifth.
bench: .venv/.installed
	$(BIN)/python tools/bench.py --out tools/tables/bench.md

# On a machine with a GPU, its kind in GPU: what the allocator did in real steps beside its simulation, every pass measured beside its
# forecast, and a chain of two ranks beside one process. It takes Python's own packages, with torch and timm, and build/gpu-packages if that is there.
GPU ?= H100
RUN_GPU := PYTHONPATH=build/gpu:build/gpu-packages:tools $(PYTHON)

gpu:
	rm -rf build/gpu && mkdir -p build/gpu/graphopt
	ln -s $(CURDIR)/graphopt/* $(CURDIR)/passes $(CURDIR)/specs build/gpu/graphopt/
	$(RUN_GPU) tools/gpu_passes.py --device "$(GPU)" --out tools/tables/gpu_passes.md
	$(RUN_GPU) tools/gpu_checks.py --device "$(GPU)" --out tools/tables/gpu_checks.md --recordings build/recordings
	$(RUN_GPU) tools/gpu_modules.py --out tools/tables/gpu_modules.md

# What such a machine may lack, for Python 3.12 on x86-64, to be taken there in build/gpu-packages.
gpu-packages:
	$(PYTHON) -m pip install $(PIP_ARGS) --target build/gpu-packages --python-version 3.12 --platform manylinux2014_x86_64 \
	  --only-binary :all: --upgrade pydantic tomli

clean:
	rm -rf build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
