# make test and make demo are all that a fresh machine with Python 3.11 needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
GOLDEN = tests/golden

.PHONY: test test-slow lint demo shapes shapes-gpu tour bench clean

# Reinstalled whenever the dependencies change.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

test: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile

# Minutes and gigabytes: the full-size conversion among them.
test-slow: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow -s

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# A small JanusFlow learns from nothing to draw coloured shapes and to answer about them, and is
# scored: runs/demo/scores.json, drawn.png, answered.png. Other seeds: make demo SEED=1. `make shapes`
# is the same in an hour and a half. What was interrupted goes on, what has been scored begins anew.
# A device for each of two cores, with a thread of its own, works on what fits its cache, and large
# buffers lie in huge pages: together 1.4 times as fast as one device with two threads.
SEED ?= 0
TWO_CORES = JAX_NUM_CPU_DEVICES=2 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592
# Ten minutes learn little from captions without colors, and nothing from questions of relation;
# ninety learn both.
demo: SCENES = 12000 --colored 75 --relations 25
demo: BENCHMARK = prompts=240 pictures=60
# Half of its scenes in more colors, with words for them, is what lets it draw pairs never seen.
shapes: SCENES = 40000 --wide 50 --counting 3
shapes: WORDS = wide=true
demo shapes: export JAX_PLATFORMS = cpu
demo shapes: $(VENV)/.installed
	[ ! -e runs/$@/scores.json ] || rm -rf runs/$@
	mkdir -p runs/$@ && { [ -e runs/$@/began ] || date +%s > runs/$@/began; }
	$(BIN)/python -m jflow.data build shapes --out runs/$@/data --train $(SCENES) --seen 1 --unseen 1 \
	    --rounds 1 --seed $(SEED) & \
	{ [ -e runs/$@/init ] || $(BIN)/python -m jflow.scratch --out runs/$@/init seed=$(SEED) $(WORDS); } && \
	    wait $$!
	[ -e runs/$@/cache ] || \
	    $(BIN)/python -m jflow.data cache --config configs/$@.py --out runs/$@/cache --batch 64
	$(TWO_CORES) $(BIN)/python train.py --config configs/$@.py --run runs/$@/train seed=$(SEED)
	$(BIN)/python -m jflow.evals --ckpt runs/$@/train --untrained runs/$@/init --out runs/$@ \
	    --began $$(cat runs/$@/began) $(BENCHMARK)

# The same on one GPU, in about nine minutes, not yet measured whole: $(BIN)/pip install -e ".[cuda]"
# comes first.
shapes-gpu: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) bash scripts/shapes_gpu.sh

# The released format: converts the small checkpoint that the tests are made of, draws with it, asks
# it about a photo, and converts it back.
tour: $(VENV)/.installed
	rm -rf runs/tour && mkdir -p runs
	$(BIN)/python -m jflow.convert from-hf $(GOLDEN)/tiny --vae $(GOLDEN)/vae_tiny --out runs/tour/ckpt
	$(BIN)/python sample.py --ckpt runs/tour/ckpt --prompt "a photo of a cat" --prompt "a red circle" \
	    --num 4 --out runs/tour/images
	$(BIN)/python sample.py --ckpt runs/tour/ckpt --image docs/cat.jpg \
	    --question "What is in this picture?" --max-new-tokens 32
	$(BIN)/python -m jflow.convert to-hf runs/tour/ckpt --out runs/tour/hf

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/sampling.py

clean:
	rm -rf $(VENV) build *.egg-info
