#!/usr/bin/env bash
# All that wants a GPU, in one call of less than 10 minutes: at full size in bfloat16 the training
# step by batch and remat policy, and sampling with PyTorch beside it; cuDNN's attention against
# XLA's, and the float32 goldens.
#
#     bash benchmarks/gpu.sh                   # writes <date>_gpu.json in $OUT or benchmarks/results
#     bash benchmarks/gpu.sh --device cpu      # the same parts, tiny: whether this script works
#
# Needs python3 (or $PYTHON) with jflow's dependencies, pytest, pytest-xdist and torch; nothing is
# installed, and what is missing is said at once. A part that fails or takes too long leaves its log,
# and the others go on; the file is written anew after each.
set -u
cd "$(dirname "$0")/.." || exit 1
device=gpu
if [ "$*" = "--device cpu" ]; then
    device=cpu
elif [ $# -gt 0 ]; then
    echo "gpu.sh: it takes --device cpu, or nothing" >&2
    exit 2
fi
python=${PYTHON:-python3}
results=${OUT:-benchmarks/results}
name=$(date +%F)_$device
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
mkdir -p "$results"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
step=(--size full --rounds 2)
sampling=(--device gpu --vae --rounds 2)
compared="gpu or logits or velocity or guided"
# Seconds for the step and the checks, and from the start until the last part has to be over: a
# lease's call ends after 600.
step_limit=270 checks_limit=120 deadline=560
# What is compared needs no best products, and finding them takes minutes.
quick=--xla_gpu_autotune_level=0\ --xla_gpu_enable_triton_gemm=false
if [ $device = cpu ]; then
    export JAX_PLATFORMS=cpu
    step=(--size tiny --rounds 1)
    sampling=(--layers 1 --vocab-size 256 --steps 1 --rounds 1 --vae)
    compared="gpu or plain_positions"
    step_limit=600 checks_limit=600 deadline=1800  # Here nothing is lent.
fi
failed=0 checks=

# All that the parts import, and the device: better now than after minutes.
XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -c "
import sys
sys.path.insert(0, 'benchmarks')
import pytest, xdist, ours, sampling, step, torch_reference, tests.test_attention, tests.test_goldens
import jax
print('jax', jax.__version__, *jax.devices())" || exit 2
echo "== preflight: $SECONDS s"

# part NAME SECONDS COMMAND...: its log is <date>_gpu_NAME.txt, its outcome goes into the JSON.
part() {
    local part=$1 limit=$2 began=$SECONDS status=0 log=$results/${name}_$1.txt
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1 || status=$?
    [ $status -eq 0 ] || failed=1
    echo "== $part: status $status after $((SECONDS - began)) s"
    tail -n 15 "$log"
    checks+="${checks:+, }\"$part\": {\"status\": $status, \"seconds\": $((SECONDS - began))}"
    echo "{$checks}" >"$parts/checks.json"
    "$python" benchmarks/report.py "$parts" --out "$results/$name.json" >"$results/${name}_tables.md"
}

part step $step_limit "$python" benchmarks/step.py "${step[@]}" --json "$parts/step.json"
# Nor do they need all of the memory, and several compile at a time.
XLA_FLAGS="${XLA_FLAGS:-} $quick" XLA_PYTHON_CLIENT_PREALLOCATE=false \
    part checks $checks_limit "$python" -m pytest -q -n 4 tests/test_attention.py tests/test_goldens.py \
    -k "$compared"
# All of the time that is left: it writes what it has after each of its tables.
part sampling $((deadline - SECONDS)) "$python" benchmarks/sampling.py "${sampling[@]}" \
    --json "$parts/sampling.json"
cat "$results/${name}_tables.md"
exit $failed
