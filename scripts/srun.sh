#!/usr/bin/env bash
# srun, but SIGTERM reaches the tasks: srun itself would kill them at once, without a checkpoint.
# slurm.sbatch calls it.
set -u
# shellcheck source=scripts/wait_for.sh
. "$(dirname "$0")/wait_for.sh"
# Without --batch it goes to the tasks of the job's steps, and not to the script that began them.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
srun "$@" &
wait_for $!
