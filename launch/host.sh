#!/usr/bin/env bash
# What a TPU VM does when launch/tpu_vm.sh asks it; run on each host of a slice, by ssh.
#   bash bltjax/launch/host.sh install       Python and the package, beside the sources
#   bash bltjax/launch/host.sh start VERB... `python -m bltjax VERB...`, in the background
#   bash bltjax/launch/host.sh state         HOST running SECONDS, HOST ended CODE or HOST idle
set -euo pipefail
cd "$(dirname "$0")/.."
log=runs/host.log pid_file=runs/host.pid code_file=runs/host.code
running() {
    [ -s "$pid_file" ] && [ ! -e "$code_file" ] && kill -0 "$(cat "$pid_file")" 2> /dev/null
}
mkdir -p runs
case "${1:-}" in
    install)
        # The images of TPU VMs come with Python 3.10, which is too old.
        [ -x .venv/bin/python ] || {
            python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --python 3.12 .venv
        }
        python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[tpu,gs]"
        echo "$(hostname) has bltjax" ;;
    start)
        shift
        if running; then
            echo "$(hostname): a run is going on, process $(cat "$pid_file"); see $PWD/$log" >&2
            exit 1
        fi
        rm -f "$code_file"
        # shellcheck disable=SC2016  # expanded by the inner shell
        setsid nohup bash -c '
            echo $$ > "$0"
            code=0
            # Never a quiet run on the CPUs of a TPU VM.
            export JAX_PLATFORMS=tpu,cpu
            bash launch/restart.sh .venv/bin/python -u -m bltjax "${@:2}" || code=$?
            echo "$code" > "$1"
        ' "$pid_file" "$code_file" "$@" >> "$log" 2>&1 < /dev/null &
        echo "$(hostname) started: $*" ;;
    state)
        if [ -e "$code_file" ]; then
            echo "$(hostname) ended $(cat "$code_file")"
        elif running; then
            echo "$(hostname) running $(($(date +%s) - $(stat -c %Y "$pid_file")))"
        elif [ -s "$pid_file" ]; then
            echo "$(hostname) ended 75"  # it never said so: the host itself was started again
        else
            echo "$(hostname) idle"
        fi ;;
    *) echo "usage: bash launch/host.sh install | start VERB... | state" >&2; exit 2 ;;
esac
