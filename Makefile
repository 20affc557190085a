# make test and make demo are all that a fresh machine with Python 3.11 needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
GOLDEN = tests/golden

.PHONY: test test-slow lint demo bench clean

# Reinstalled whenever the dependencies change.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

test: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest

# Minutes and gigabytes: the full-size conversion among them.
test-slow: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow -s

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# Converts the small checkpoint that the tests are made of, draws with it and asks it about a photo.
demo: $(VENV)/.installed
	rm -rf runs/demo && mkdir -p runs
	$(BIN)/python -m jflow.convert from-hf $(GOLDEN)/tiny --vae $(GOLDEN)/vae_tiny --out runs/demo/ckpt
	$(BIN)/python sample.py --ckpt runs/demo/ckpt --prompt "a photo of a cat" --prompt "a red circle" \
	    --num 4 --out runs/demo/images
	$(BIN)/python sample.py --ckpt runs/demo/ckpt --image docs/cat.jpg \
	    --question "What is in this picture?" --max-new-tokens 32
	$(BIN)/python -m jflow.convert to-hf runs/demo/ckpt --out runs/demo/hf

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/sampling.py

clean:
	rm -rf $(VENV) runs build *.egg-info
