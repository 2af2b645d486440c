#!/usr/bin/env bash
# GPU nodes of a SLURM cluster; from its login node, in a folder that all nodes share.
set -euo pipefail
usage() {
    cat << 'USAGE'
usage: bash launch/slurm.sh [OPTIONS] -- VERB ...

Installs the package into .venv here, then submits launch/slurm_job.sh: `python -m bltjax VERB ...`,
one process for each GPU. A job that is preempted or out of time saves, queues again and resumes.

  --nodes 2             default 1
  --gpus 8              of each node; default 8
  --cpus 12             for each GPU; default 8
  --time 24:00:00       HH:MM:SS; default what the partition gives
  --partition PARTITION --account ACCOUNT --qos QOS    as the cluster asks for them
  --dry-run             prints the commands, runs nothing, contacts nothing

Watch it by squeue --me, and tail -f runs/slurm-JOB.log; end it by scancel JOB.
USAGE
}
cd "$(dirname "$0")/.."
source launch/launching.sh
shared_disk=true nodes=1 gpus=8 cpus=8 options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --nodes) nodes="$(value_of "$@")"; shift 2 ;;
        --gpus) gpus="$(value_of "$@")"; shift 2 ;;
        --cpus) cpus="$(value_of "$@")"; shift 2 ;;
        --time)
            check --time "$(value_of "$@")" '[0-9]{1,4}:[0-5][0-9]:[0-5][0-9]' 24:00:00
            options+=("$1=$2"); shift 2 ;;
        --partition|--account|--qos)
            check "$1" "$(value_of "$@")" '[A-Za-z0-9][-A-Za-z0-9_.,]*' 'gpu: letters, digits, -_.,'
            options+=("$1=$2"); shift 2 ;;
        --dry-run) dry_run=true; shift ;;
        -h|--help) usage; exit 0 ;;
        --) shift; break ;;
        *) fail "there is no option $1; --help lists them" ;;
    esac
done
check_count --nodes "$nodes" 4096
check_count --gpus "$gpus" 16
check_count --cpus "$cpus" 256
check_command "$@"
needs sbatch
perform bash -euc 'source launch/environment.sh gpu,gs'
perform mkdir -p runs
perform sbatch --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
    --cpus-per-task="$cpus" "${options[@]}" launch/slurm_job.sh "$@"
