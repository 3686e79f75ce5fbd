# make demo    shards the embedded digits, trains on them, draws the curves
# make test    format, lint and tests
# make faults  sharder and training killed 50 times each, and all else that can go wrong
# make simd    Pillow-SIMD instead of Pillow, built here: needs a compiler and the headers of libjpeg and zlib
# make bench   loader rates beside their peers (IMAGES=a folder of class folders, or a tar of one)
# make accuracy   CIFAR-10 by three recipes, side by side (IMAGES=a folder of train/ and test/, or a tar of them)
# make gpu-proof   what only a GPU can show; ARGS='--device cpu --tiny' walks the same steps without one

VENV ?= .venv
PYTHON ?= python3
# For a driver that is older than 580: make EXTRAS=test,dali-cu12
EXTRAS ?= dev
CONSTRAINTS ?= constraints.txt
IMAGES ?=
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LAUNCH := $(BIN)/accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup demo test format faults simd accuracy bench gpu-proof clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

shards/digits/manifest.json: $(INSTALLED)
	rm -rf shards/digits
	$(BIN)/python tools/make_shards.py digits --out shards/digits

demo: shards/digits/manifest.json
	rm -rf runs/demo
	$(LAUNCH) --num_processes 1 train/run.py demo --data.shards shards/digits --run.dir runs/demo
	$(BIN)/python tools/report.py runs/demo

test: $(INSTALLED)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

faults: $(INSTALLED)
	FAULTS=50 $(BIN)/python -m pytest tests/tools/test_faults.py tests/faults $(ARGS)

simd: $(INSTALLED)
	$(BIN)/python -m pip uninstall --yes --quiet pillow
	CC="$${CC:-cc} -mavx2" $(BIN)/python -m pip install --no-deps --no-cache-dir pillow-simd

accuracy: $(INSTALLED)
	$(BIN)/python tools/bench accuracy --images $(IMAGES) $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python tools/bench loader --images $(IMAGES) $(ARGS)

gpu-proof:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_proof.py $(ARGS)

clean:
	rm -rf build *.egg-info runs/demo shards/digits
