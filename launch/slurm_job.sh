#!/usr/bin/env bash
#SBATCH --job-name=bltjax
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# What launch/slurm.sh submits: `python -m bltjax ARGUMENTS` once for each GPU. Five minutes before
# its time is over, or when it is preempted, a run saves and exits with 75; then the job queues
# again and resumes. A process that dies is restarted within the job; with an error, it ends all.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# shellcheck disable=SC1091
source "${VIRTUAL_ENV:-.venv}/bin/activate"
# Never a quiet run on the CPUs of a node with GPUs.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
code=0
# jax finds its processes by SLURM's variables: task I of a node takes GPU I. Not
# --kill-on-bad-exit, which would kill those that are still saving; they have two minutes.
srun --label --kill-on-bad-exit=0 --wait=120 \
    bash launch/restart.sh python -u -m bltjax "$@" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
