#!/usr/bin/env bash
# One process per node with all its GPUs; the processes find each other by Slurm's variables. (With
# several tasks per node each has the GPU of its number there.)
#
#   sbatch --nodes=4 tools/launch/slurm.sh folder --data.path /data/sounds --out /shared/runs/one
#
# The run folder must be on a file system that all nodes share. The job asks to be requeued and to
# be signalled 120 s before its end: the run then saves, exits with 143, and resumes when requeued.
#SBATCH --job-name=aatjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

[ "$#" -gt 0 ] || { echo "usage: sbatch slurm.sh CONFIG [flags of aatjax train]" >&2; exit 2; }
srun --kill-on-bad-exit=1 aatjax train "$@"
code=$?
if [ "$code" -eq 143 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
