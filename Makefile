# make demo    shards the embedded digits, trains on them, draws the curves
# make test    format, lint, types and the tests that prove each promise once, in four to seven minutes on two cores
# make test-all   and those that prove a promise a second time (tests/README.md)
# make docs-test   the commands and scripts of README.md and docs/, as they stand there; make test-all includes it
# make faults  sharder and training killed 50 times each, and all else that can go wrong
# make netns-test   two hosts as network namespaces, a cable that is pulled, rejections at start: needs root
# make slurm-test   sharding and training on a real Slurm of two nodes on this machine: needs root and Debian
# make ray-test   sharding on a Ray cluster of two nodes on this machine, whose workers and drivers are killed
# make simd    Pillow-SIMD instead of Pillow, for images that are no JPEGs: needs a compiler, headers of libjpeg and zlib
# make bench   loader rates beside their peers (IMAGES=a folder of class folders, or a tar of one)
# make accuracy   CIFAR-10 by three recipes, side by side (IMAGES=a folder of train/ and test/, or a tar of them)
# make image   the image, and the demo inside it, by docker, podman or buildah, whichever is installed (docs/docker.md)
# make gpu-proof   what only a GPU can show (docs/gpu-proof.md); ARGS='--device cpu --tiny' runs the same steps without one

VENV ?= .venv
PYTHON ?= python3
# For a driver that is older than 580: EXTRAS=test,dali-cu12, with torch for CUDA 12 (README.md, "Where it runs")
EXTRAS ?= dev
CONSTRAINTS ?= constraints.txt
IMAGES ?=
# Files of tests at a time: one more than two cores, since tests wait for processes and for time
JOBS ?= 3
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCRIPTS := .ci/run $(shell find docker tests tools -name '*.sh' -o -name '*.sbatch')
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
LAUNCH := $(BIN)/accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup demo test types test-fast test-slow test-all docs-test format faults simd accuracy bench gpu-proof netns-test slurm-test ray-test image clean

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

# The types beside the tests, which now and then wait
test: $(INSTALLED)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck --external-sources $(SCRIPTS)
	$(MAKE) --no-print-directory -j 2 types test-fast

# Not on Python 3.10, whose NumPy (2.2) lacks types that ours rely on
types: $(INSTALLED)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info > (3, 11))' || $(BIN)/mypy

test-fast: $(INSTALLED)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

docs-test: $(INSTALLED)
	$(PYTEST) tests/test_docs.py tests/test_docs_commands.py tests/test_packaging.py $(ARGS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

faults: $(INSTALLED)
	FAULTS=50 $(BIN)/python -m pytest tests/tools/test_faults.py tests/faults tests/pipeline/test_manifest.py tests/pipeline/test_cuts.py $(ARGS)

SLURM_PACKAGES := slurmctld slurmd munge slurm-client

netns-test: $(INSTALLED)
	command -v ip >/dev/null || apt-get install --yes --no-install-recommends iproute2
	NETNS_TEST=1 $(BIN)/python -m pytest tests/cluster/test_netns.py $(ARGS)

slurm-test: $(INSTALLED)
	dpkg -s $(SLURM_PACKAGES) >/dev/null 2>&1 || \
		{ apt-get update && apt-get install --yes --no-install-recommends $(SLURM_PACKAGES); }
	SLURM_TEST=1 $(BIN)/python -m pytest tests/slurm $(ARGS)

ray-test: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[ray]'
	$(BIN)/python -m pytest tests/pipeline/test_ray.py $(ARGS)

simd: $(INSTALLED)
	$(BIN)/python -m pip uninstall --yes --quiet pillow
	CC="$${CC:-cc} -mavx2" $(BIN)/python -m pip install --no-deps --no-cache-dir pillow-simd

accuracy: $(INSTALLED)
	$(BIN)/python tools/bench accuracy --images $(IMAGES) $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python tools/bench loader --images $(IMAGES) $(ARGS)

gpu-proof:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_proof.py $(ARGS)

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
COMMIT = $(shell git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)
# Of the repository, without anybody's name or password
SOURCE = $(shell git config --get remote.origin.url 2>/dev/null | sed -nE 's|^(https?://)([^/@]*@)?|\1|p')
IMAGE ?= imagenet-express:$(VERSION)
ENGINE ?= $(notdir $(firstword $(foreach engine,docker podman buildah,$(shell command -v $(engine)))))
# OCI's own format, the default of all but docker, knows no HEALTHCHECK
FORMAT = $(if $(filter docker,$(ENGINE)),,--format docker)
BUILD_ARGS = $(foreach name,BASE DALI TORCH_INDEX PILLOW_SIMD COMPILER,$(if $($(name)),--build-arg $(name)='$($(name))'))

image:
	$(if $(ENGINE),,$(error make image needs docker, podman or buildah; none of them is installed))
	DOCKER_BUILDKIT=1 $(ENGINE) build $(FORMAT) $(BUILD_ARGS) --build-arg VERSION='$(VERSION)' \
		--build-arg COMMIT='$(COMMIT)' --build-arg SOURCE='$(SOURCE)' --file docker/Dockerfile --tag $(IMAGE) .
	$(if $(filter buildah,$(ENGINE)),,$(ENGINE) run --rm $(IMAGE) smoke)
	$(if $(filter buildah,$(ENGINE)),,$(ENGINE) image inspect --format '{{.Size}} bytes' $(IMAGE))

clean:
	rm -rf build *.egg-info runs/demo shards/digits
