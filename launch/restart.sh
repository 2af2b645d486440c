#!/usr/bin/env bash
# Runs a command again for as long as it asks for it by exit code 75, or dies of a signal (codes
# above 128: killed for memory, a crash in a driver). Any other code is an answer, and becomes this
# script's. A SIGTERM is passed on, and nothing is started again: then the code is the command's, or
# 75 if it died of the signal, as a program does that has nothing to save yet.
# A Ctrl-C reaches the command itself; this script waits for its end, and starts nothing again.
# After 20 runs in a row of under ten minutes each it gives up, with code 1.
#   bash launch/restart.sh COMMAND...
set -euo pipefail
case "${1:---help}" in
    --help) echo "usage: bash launch/restart.sh COMMAND..." >&2; exit 2 ;;
esac
most=20 long=600 pause="${BLTJAX_RESTART_PAUSE:-10}"
terminated=false stopped=false interrupted=false child=
pass_on() {
    terminated=true interrupted=true
    [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true
}
trap pass_on TERM
trap 'stopped=true interrupted=true' INT
short=0
while true; do
    started=$SECONDS
    (trap - INT; exec "$@") &  # without the trap the shell would have it ignore a Ctrl-C
    child=$!
    interrupted=true
    while $interrupted; do  # a trap ends `wait` before the command has ended
        interrupted=false code=0
        wait "$child" || code=$?
    done
    child=
    if $terminated; then
        [ "$code" -le 128 ] || code=75
        exit "$code"
    fi
    case "$code" in
        130) exit 130 ;;  # a person's Ctrl-C
        75) ! $stopped || exit 130 ;;
        *)
            [ "$code" -gt 128 ] || exit "$code"
            ! $stopped || exit 130
            ;;
    esac
    if [ $((SECONDS - started)) -lt $long ]; then
        short=$((short + 1))
    else
        short=0
    fi
    if [ $short -ge $most ]; then
        echo "restart.sh: exit code $code; $most runs in a row took under $long s: giving up" >&2
        exit 1
    fi
    echo "restart.sh: exit code $code after $((SECONDS - started)) s; again in $pause s" >&2
    sleep "$pause" &
    wait $! || kill $! 2> /dev/null || true  # a signal needn't wait for it
    ! $terminated || exit 75
    ! $stopped || exit 130
done
