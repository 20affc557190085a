#!/usr/bin/env bash
# jflow on a TPU pod slice, from one's own machine, by gcloud.
#
#     export TPU=jflow ZONE=us-west4-a TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite
#     scripts/tpu.sh create [--spot]             # rents it: it costs money from here on
#     scripts/tpu.sh install                     # this checkout and its packages, on all hosts
#     scripts/tpu.sh train --config configs/pretrain.py --run /mnt/shared/pretrain hardware=v5e-64
#     scripts/tpu.sh log | stop | delete         # host 0's output; save and end; give it back
#     scripts/tpu.sh keep [--spot] -- --config ...    # all of it, and again when it was taken away;
#                                                # end it before `stop` and `delete`
#
# TYPE and RUNTIME: v5litepod-64 with v2-alpha-tpuv5-lite, v5p-64 (counted in cores: 32 chips) with
# v2-alpha-tpuv5, v6e-64 with v2-alpha-tpuv6e. The run folder must be one that all hosts see; MOUNT
# is a command that makes it so, run on each host by every `install`, so it must bear repetition.
# JAX_COMPILATION_CACHE_DIR, there or in a bucket, is handed on: a slice that comes back then compiles
# nothing anew.
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

# A shell of its own, which removes its folder however it ends; joined by &&, as `set -e` is off in
# what `keep` calls.
install() (
    folder=$(mktemp -d) && trap 'rm -r "$folder"' EXIT &&
        git archive --format tar.gz --output "$folder/jflow.tar.gz" HEAD &&
        "${tpu[@]}" scp "$folder/jflow.tar.gz" "$TPU:jflow.tar.gz" "${every[@]}" &&
        # The hosts' own Python may be older than what jflow needs; uv brings another.
        on_all "mkdir -p jflow && tar -xzf jflow.tar.gz -C jflow && cd jflow &&
            python3 -m pip install --quiet --user uv && export PATH=\$HOME/.local/bin:\$PATH &&
            uv venv --quiet --allow-existing --python '>=3.11' .venv &&
            uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]' && {
                ${MOUNT:-true}
            }"
)

train() {
    # It goes on without this connection; `stop` needs the loop's number, `keep` how it ended.
    local folder=${JAX_COMPILATION_CACHE_DIR:-} cache=
    [ -z "$folder" ] || cache="export JAX_COMPILATION_CACHE_DIR=$(printf %q "$folder") &&"
    on_all "cd jflow && $cache rm -f train.pid train.status && { setsid nohup bash -c '
        scripts/until_done.sh \"\$@\" & echo \$! >train.pid; wait \$!; echo \$? >train.status
    ' - .venv/bin/python train.py $(printf '%q ' "$@") >>train.log 2>&1 </dev/null & }"
}

# The slice's state, "gone" where there is none, nothing where nobody could say.
state() {
    local errors
    errors=$(mktemp)
    if ! "${tpu[@]}" describe "$TPU" --zone "$ZONE" --format 'value(state)' 2>"$errors" &&
        grep -q NOT_FOUND "$errors"; then
        echo gone
    fi
    rm "$errors"
}

# How host 0's loop ended: "running", its exit status, "none" where it was never begun, nothing
# where nobody could say.
ended() {
    "${tpu[@]}" ssh "$TPU" --zone "$ZONE" --worker 0 --command "
        cd jflow; if kill -0 \$(cat train.pid); then echo running
        else cat train.status || echo none; fi" 2>/dev/null
}

keep() {
    local options=() status
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    if [ $# -lt 2 ]; then
        echo "tpu.sh: give train.py's arguments behind a --: keep [--spot] -- --config ..." >&2
        return 2
    fi
    shift
    while true; do
        case $(state) in
        PREEMPTED | TERMINATED | gone)
            "${tpu[@]}" delete "$TPU" --zone "$ZONE" --quiet 2>/dev/null || true
            # macOS's bash takes an empty array for an unbound one.
            create ${options[@]+"${options[@]}"} || true
            ;;
        READY)
            status=$(ended || true)
            case $status in
            running | '') ;;
            none | 75) install && train "$@" || true ;; # 75: told to stop, as before it is taken away
            *)
                echo "tpu.sh: training ended with $status (scripts/tpu.sh log); the slice is still" \
                    "rented: scripts/tpu.sh delete gives it back" >&2
                return "$status"
                ;;
            esac
            ;;
        esac
        sleep "${PAUSE:-120}"
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
