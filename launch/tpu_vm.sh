#!/usr/bin/env bash
# TPU VMs, one slice or several, by queued resources.
set -euo pipefail
usage() {
    cat << 'USAGE'
usage: bash launch/tpu_vm.sh ACTION --name NAME --zone ZONE [OPTIONS] [-- VERB ...]

  create   asks for the slices, and waits until they are there
  setup    copies this repository to every host, as it is now, and installs it
  run      starts `python -m bltjax VERB ...` on every host, in the background
  watch    shows every minute how the run goes, until it ends
  keep     create, setup, run, watch; all over again when slices are preempted
  delete   gives the slices back, whatever runs on them

  --topology v5p:4x4x4   chip and shape of a slice, as `python -m bltjax plan` has (create, keep)
  --slices 2             how many of them, in one run; default 1 (create, keep)
  --spot                 cheaper, may be preempted (create, keep)
  --reserved             from a reservation (create, keep)
  --project PROJECT      default: gcloud's own
  --every SECONDS        between looks at the state; default 60 (create, watch, keep)
  --dry-run              prints the commands, runs nothing, contacts nothing

A run that exits with 75 (preempted, a host lost: it has saved what it could) or dies of a signal
is started again on its host and resumes. `watch` exits with its code, or 75 if slices are gone.
Before the first slice of several hosts: ssh-add ~/.ssh/google_compute_engine, as gcloud asks.
USAGE
}
cd "$(dirname "$0")/.."
source launch/launching.sh
name='' zone='' topology='' slices=1 capacity=() project=() every=60
[ $# -gt 0 ] || { usage >&2; exit 2; }
case "$1" in
    create|setup|run|watch|keep|delete) action="$1"; shift ;;
    -h|--help) usage; exit 0 ;;
    *) fail "$1 is not an action: create, setup, run, watch, keep or delete" ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        --name) name="$(value_of "$@")"; shift 2 ;;
        --zone) zone="$(value_of "$@")"; shift 2 ;;
        --topology) topology="$(value_of "$@")"; shift 2 ;;
        --slices) slices="$(value_of "$@")"; shift 2 ;;
        --project) check_project "$(value_of "$@")"; project=("$1=$2"); shift 2 ;;
        --every) every="$(value_of "$@")"; shift 2 ;;
        --spot|--reserved) capacity+=("$1"); shift ;;
        --dry-run) dry_run=true; shift ;;
        -h|--help) usage; exit 0 ;;
        --) shift; break ;;
        *) fail "there is no option $1; --help lists them" ;;
    esac
done
check_name --name "$name"
check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-a
check_count --slices "$slices" 64
check_count --every "$every" 3600
[ ${#capacity[@]} -le 1 ] || fail "--spot and --reserved exclude each other"
case "$action" in
    create|keep) slice "$topology"; check_named_by_number ;;
esac
case "$action" in
    run|keep) check_command "$@" ;;
    *) [ $# -eq 0 ] || fail "$action runs nothing, so nothing may follow --" ;;
esac
needs gcloud

queued=(gcloud compute tpus queued-resources)
where=(--zone="$zone" "${project[@]}")
ssh=("${queued[@]}" ssh "$name" "${where[@]}")
ask='bash bltjax/launch/host.sh state'

state() {  # of the queued resource: ACCEPTED, WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, FAILED...
    perform "${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
}

create() {
    local nodes=(--node-id="$name") found=
    [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
    # Without the scope a run could read buckets but not write to them.
    perform "${queued[@]}" create "$name" "${where[@]}" --accelerator-type="$accelerator_type" \
        --runtime-version="$runtime" "${nodes[@]}" "${capacity[@]}" --scopes=cloud-platform \
        || return
    if $dry_run; then
        echo "# every $every s, until it says ACTIVE:"
        state
        return
    fi
    while [ "$found" != ACTIVE ]; do
        found="$(state || true)"
        echo "$(date +%T) $name is ${found:-not known yet}"
        case "$found" in
            ACTIVE) ;;
            FAILED|SUSPENDED) return 75 ;;
            *) sleep "$every" ;;
        esac
    done
}

setup() {
    # Sources of another version must not stay behind.
    local unpack='rm -rf bltjax/bltjax bltjax/configs && mkdir -p bltjax'
    unpack+=' && tar -xzf bltjax.tar.gz -C bltjax'
    local archive=/tmp/bltjax-$name.tar.gz
    # shellcheck disable=SC2016  # expanded by the inner shell
    perform bash -c 'git ls-files -z | tar -cz --null --files-from=- --file="$0"' "$archive" \
        && perform "${queued[@]}" scp "$archive" "$name:bltjax.tar.gz" "${where[@]}" \
            --node=all --worker=all \
        && on_hosts "$unpack && bash bltjax/launch/host.sh install"
}

on_hosts() { perform "${ssh[@]}" --node=all --worker=all --command="$1"; }
first_host() { perform "${ssh[@]}" --node=0 --worker=0 --command="$1"; }

run() { on_hosts "bash bltjax/launch/host.sh start $(quoted "$@")"; }

watch() {
    local last='tail -n 2 bltjax/runs/host.log' hosts codes running ended found error
    if $dry_run; then
        echo "# every $every s, until every host has ended:"
        state
        on_hosts "$ask"
        first_host "$last"
        return
    fi
    while true; do
        found="$(state || true)"
        case "$found" in
            SUSPENDING|SUSPENDED|FAILED) echo "$name is $found: its slices are gone"; return 75 ;;
        esac
        # A host that doesn't answer now may answer in a minute.
        hosts="$(on_hosts "$ask" 2> /dev/null || true)"
        codes="$(sed -n 's/.* ended \([0-9]*\)$/\1/p' <<< "$hosts" | sort -un)"
        running="$(grep -c ' running ' <<< "$hosts" || true)"
        ended="$(grep -c ' ended ' <<< "$hosts" || true)"
        echo "$(date +%T) $name is ${found:-not answering}: $running hosts run, $ended have ended"
        if [ "$running$ended" = 00 ] && grep -q ' idle$' <<< "$hosts"; then
            echo "no host runs anything; start it with: bash launch/tpu_vm.sh run"
            return 1
        fi
        if [ "$ended" -gt 0 ] && { [ "$running" -eq 0 ] || [ "$codes" != 0 ]; }; then
            grep ' ended ' <<< "$hosts"
            # An error on one host is the reason for what the others ended with.
            error="$(grep -vx -e 0 -e 75 <<< "$codes" | head -n 1 || true)"
            return "${error:-$(tail -n 1 <<< "$codes")}"
        fi
        first_host "$last" 2> /dev/null || true
        sleep "$every"
    done
}

delete() { perform "${queued[@]}" delete "$name" "${where[@]}" --force --quiet; }

keep() {
    local code found=
    while true; do
        code=0
        $dry_run || found="$(state 2> /dev/null || true)"
        if [ "$found" != ACTIVE ]; then
            [ -z "$found" ] || delete || true
            create || code=$?
        fi
        # A run that an earlier `keep` left behind only needs to be watched.
        if [ "$code" -eq 0 ]; then
            { [ -n "$found" ] && on_hosts "$ask" | grep -q ' running '; } \
                || { setup && run "$@"; } || echo "not started on every host" >&2
            watch || code=$?
        fi
        ! $dry_run || { echo "# if that ends with 75, all over again, after:"; delete; return; }
        [ "$code" -eq 75 ] || return "$code"
        delete || true
        sleep "$every"
    done
}

case "$action" in
    run|keep) "$action" "$@" ;;
    *) "$action" ;;
esac
