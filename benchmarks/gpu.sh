#!/usr/bin/env bash
# All that wants a GPU, in one call of less than 10 minutes: the float32 goldens, then speed at full
# size in bfloat16. Needs python3 with jax, flax, torch and transformers; nothing is installed.
# Leaves goldens.txt and <date>_gpu.json in $OUT, or else in benchmarks/results/.
set -u
cd "$(dirname "$0")/.."
results=${OUT:-benchmarks/results}
mkdir -p "$results"
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0

JAX_PLATFORMS=cuda timeout 180 python3 -m pytest -q tests/test_goldens.py >"$results/goldens.txt" 2>&1 ||
    failed=1
tail -n 15 "$results/goldens.txt"

timeout 400 python3 benchmarks/sampling.py --device gpu --vae \
    --json "$results/$(date +%F)_gpu.json" || failed=1
exit $failed
