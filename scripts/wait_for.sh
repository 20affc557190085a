# shellcheck shell=bash
# Waits for a process although signals end a wait; its exit status.
wait_for() {
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    # That wait may have ended with a signal's status; bash keeps the process's.
    wait "$1"
}
