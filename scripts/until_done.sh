#!/usr/bin/env bash
# Runs a command again until it ends well; train.py continues from its last checkpoint each time.
# A command that was told to stop ends it too, with its exit status 75 (train.py): whoever told it,
# here or on another host, begins it again.
#
#     scripts/until_done.sh python train.py --config configs/pretrain.py
#
# Gives up, with the command's exit status, after TRIES (5) failures in a row of which each came
# within QUICK (900) seconds: a mistake, then, and no lost machine. Starts that wait five minutes in
# vain for the other processes (69, jflow/distributed.py) are counted apart, up to WAITS (100) in a
# row: a machine may be away for hours. Waits PAUSE (10) seconds before each new try. SIGTERM and
# SIGINT reach the command as SIGTERM, and end the repetition.
set -u
# shellcheck source=scripts/wait_for.sh
. "$(dirname "$0")/wait_for.sh"
stopped=75 missing=69
tries=${TRIES:-5} quick=${QUICK:-900} waits=${WAITS:-100} pause=${PAUSE:-10}
child='' told='' failures=0 vain=0

tell() {
    told=yes
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap tell TERM INT

while true; do
    began=$SECONDS status=0
    "$@" &
    child=$!
    [ -z "$told" ] || tell
    wait_for "$child" || status=$?
    child=''
    if [ $status -eq 0 ] || [ $status -eq $stopped ] || [ -n "$told" ]; then
        exit $status
    fi
    if [ $((SECONDS - began)) -ge "$quick" ]; then
        failures=0
    fi
    if [ $status -eq $missing ]; then
        vain=$((vain + 1))
    else
        failures=$((failures + 1)) vain=0
    fi
    echo "until_done.sh: exit status $status after $((SECONDS - began)) s (failure $failures)" >&2
    if [ "$failures" -ge "$tries" ] || [ "$vain" -ge "$waits" ]; then
        exit $status
    fi
    sleep "$pause" &
    wait_for $!
    [ -z "$told" ] || exit $status
done
