#!/usr/bin/env bash
# configs/shapes_gpu.py from nothing on one GPU in about nine minutes, not yet measured whole:
# builds the pictures, encodes them, trains, scores. What comes out is
# runs/shapes-gpu/{scores.json,drawn.png,answered.png}.
#
#     bash scripts/shapes_gpu.sh [field=value ...]     # of the config, for example steps=15000
#
# Needs python3 (or $PYTHON) with jflow's dependencies and JAX for CUDA (or $JAX_PLATFORMS);
# nothing is installed. $SCENES are built; $MODEL and $BENCHMARK are fields of jflow.scratch and
# jflow.evals.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} run=runs/shapes-gpu
model=${MODEL:-hidden_size=256 intermediate_size=768 num_layers=6 num_heads=8 channels=128}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
# Where JAX lacks CUDA it would go on on the CPU, for hours.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
began=$(date +%s)

step() {
    "$python" "$@"
    echo "== $(($(date +%s) - began)) s: $*"
}

rm -rf $run && mkdir -p $run
# What is built needs no GPU, and what is random needs it for seconds.
step -m jflow.data build shapes --out $run/data --train "${SCENES:-100000}" --seen 1 --unseen 1 \
    --rounds 1 --wide 50 --counting 3 &
# shellcheck disable=SC2086  # Several fields.
step -m jflow.scratch --out $run/init wide=true $model
wait $!
step -m jflow.data cache --config configs/shapes_gpu.py --out $run/cache --batch 512 "$@"
step train.py --config configs/shapes_gpu.py --run $run/train "$@"
# shellcheck disable=SC2086
step -m jflow.evals --ckpt $run/train --out $run --began "$began" ${BENCHMARK:-batch_size=256}
