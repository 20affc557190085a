#!/usr/bin/env bash
# jflow on a TPU pod slice, from one's own machine, by gcloud.
#
#     export TPU=jflow ZONE=us-west4-a TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite
#     scripts/tpu.sh create [--spot]             # rents it: it costs money from here on
#     scripts/tpu.sh install                     # this checkout and its packages, on all hosts
#     scripts/tpu.sh train --config configs/pretrain.py --run /mnt/shared/pretrain hardware=v5e-64
#     scripts/tpu.sh log | stop | delete         # host 0's output; save and end; give it back
#     scripts/tpu.sh keep [--spot] -- --config ...    # all of it, and again when it was taken away
#
# TYPE and RUNTIME: v5litepod-64 with v2-alpha-tpuv5-lite, v5p-64 (counted in cores: 32 chips) with
# v2-alpha-tpuv5, v6e-64 with v2-alpha-tpuv6e. The run folder must be one that all hosts see; MOUNT
# is a command that makes it so, run on each host by `install`.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?a name for the slice}" "${ZONE:?a zone, as us-west4-a}"
tpu=(gcloud compute tpus tpu-vm)
every=(--zone "$ZONE" --worker all)

on_all() { "${tpu[@]}" ssh "$TPU" "${every[@]}" --command "$1"; }

create() {
    "${tpu[@]}" create "$TPU" --zone "$ZONE" --accelerator-type "${TYPE:?as v5litepod-64}" \
        --version "${RUNTIME:?as v2-alpha-tpuv5-lite}" "$@"
}

install() {
    local archive
    archive=$(mktemp --suffix .tar.gz)
    git archive --format tar.gz --output "$archive" HEAD
    "${tpu[@]}" scp "$archive" "$TPU:jflow.tar.gz" "${every[@]}"
    rm "$archive"
    on_all "mkdir -p jflow && tar -xzf jflow.tar.gz -C jflow && cd jflow &&
        python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu,gcs]' && ${MOUNT:-true}"
}

train() {
    # It goes on without this connection; the number of the loop is kept for `stop`.
    on_all "cd jflow && { setsid nohup scripts/until_done.sh .venv/bin/python train.py $(
        printf '%q ' "$@"
    ) >>train.log 2>&1 </dev/null & echo \$! >train.pid; }"
}

state() { "${tpu[@]}" describe "$TPU" --zone "$ZONE" --format 'value(state)' 2>/dev/null || true; }

keep() {
    local options=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    while true; do
        if [ "$(state)" != READY ]; then
            "${tpu[@]}" delete "$TPU" --zone "$ZONE" --quiet 2>/dev/null || true
            if create "${options[@]}" && install; then
                train "$@" || true
            fi
        fi
        sleep 120
    done
}

command=${1:-}
shift || true
case $command in
create | install | train | keep) "$command" "$@" ;;
log) "${tpu[@]}" ssh "$TPU" --zone "$ZONE" --worker 0 --command "tail -n 100 -f jflow/train.log" ;;
stop) on_all "kill -TERM \$(cat jflow/train.pid)" ;;
delete) "${tpu[@]}" delete "$TPU" --zone "$ZONE" ;;
*)
    echo "tpu.sh: create, install, train, log, stop, delete or keep, not '$command'" >&2
    exit 2
    ;;
esac
