# shellcheck shell=bash
# Sourced by the launchers: arguments that are checked before anything is started, commands that a
# dry run prints and a real one performs, and the slices that Cloud TPU offers.
dry_run=false shared_disk=false

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

value_of() {  # value_of OPTION REST...: the word after an option
    [ $# -ge 2 ] || fail "$1 needs a value; --help lists the options"
    printf '%s' "$2"
}

check() {  # check WHAT VALUE PATTERN EXAMPLE
    [[ "$2" =~ ^($3)$ ]] || fail "$1 is ${2:-missing}; it looks like $4"
}

check_count() {  # check_count WHAT VALUE MOST
    { [[ "$2" =~ ^[1-9][0-9]{0,5}$ ]] && [ "$2" -le "$3" ]; } || fail "$1 is $2, not 1 to $3"
}

check_name() {  # check_name OPTION VALUE
    check "$1" "$2" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "blt-1b: a letter, then a-z, 0-9 and -"
}

check_project() {
    check --project "$1" '[a-z][-a-z0-9.:]{4,61}[a-z0-9]' my-project
}

check_command() {  # what follows --: a verb of bltjax and its options
    local word config
    [ $# -gt 0 ] || fail "nothing to run: write -- and a verb, as in -- train --config=FILE"
    [[ "$1" =~ ^[a-z]+$ ]] || fail "what follows -- begins with $1, not with a verb of bltjax"
    for word in "$@"; do
        case "$word" in
            --config=*)
                config="${word#--config=}"
                [ -f "${config%%:*}" ] || fail "${config%%:*}: no such file in this repository" ;;
            --workdir|--out) fail "write $word=gs://BUCKET/PATH, with =" ;;
            --workdir=gs://*|--out=gs://*) ;;
            --workdir=*|--out=*)
                $shared_disk \
                    || fail "$word: hosts share no disk, and lose theirs; write gs://BUCKET/PATH" ;;
        esac
    done
}

quoted() {  # the words as a shell would read them again
    local word line=
    for word in "$@"; do
        if [[ "$word" =~ ^[-A-Za-z0-9_./:=@%+,]+$ ]]; then
            line+=" $word"
        else
            line+=" '${word//\'/\'\\\'\'}'"
        fi
    done
    printf '%s' "${line# }"
}

perform() {  # the command itself, or in a dry run its text
    if $dry_run; then
        quoted "$@"
        echo
    else
        "$@"
    fi
}

needs() {  # programs that a real run calls
    local program
    $dry_run && return
    for program in "$@"; do
        command -v "$program" > /dev/null \
            || fail "$program is not installed; --dry-run does without"
    done
}

cube() {  # the most compact AxBxC of so many cubes of 4x4x4, A <= B <= C
    local cubes="$1" a b c best=
    for ((a = 1; a * a * a <= cubes; a++)); do
        ((cubes % a)) && continue
        for ((b = a; a * b * b <= cubes; b++)); do
            ((cubes / a % b)) && continue
            c=$((cubes / a / b))
            if [ -z "$best" ] || ((a + b + c < best)); then
                best=$((a + b + c))
                compact="$((4 * a))x$((4 * b))x$((4 * c))"
            fi
        done
    done
}

# slice v5p:4x4x8 sets chip, shape, chips, hosts and chips_per_host, and what products call such a
# slice: accelerator_type and runtime (TPU VM), machine and gke_chip (GKE).
# shellcheck disable=SC2034  # used by the launchers
slice() {
    local most a b c flat="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" small="2x2x1 2x2x2 2x2x4 2x4x4"
    chip="${1%%:*}" shape="${1#*:}"
    [ -n "$1" ] || fail "--topology is missing; it looks like v5p:4x4x4"
    [[ "$1" == *:* ]] || fail "--topology is $1; it looks like v5p:4x4x4"
    case "$chip" in
        v4) runtime=tpu-ubuntu2204-base machine=ct4p-hightpu gke_chip=tpu-v4-podslice most=4096 ;;
        v5p) runtime=v2-alpha-tpuv5 machine=ct5p-hightpu gke_chip=tpu-v5p-slice most=6144 ;;
        v5e) runtime=v2-alpha-tpuv5-lite machine=ct5lp-hightpu gke_chip=tpu-v5-lite-podslice ;;
        v6e) runtime=v2-alpha-tpuv6e machine=ct6e-standard gke_chip=tpu-v6e-slice ;;
        *) fail "--topology has chip $chip; there are v4, v5e, v5p and v6e" ;;
    esac
    case "$chip" in
        v5e|v6e)
            [[ " $flat " == *" $shape "* ]] \
                || fail "$chip has no slice of $shape; there are ${flat// /, }"
            chips=$((${shape%x*} * ${shape#*x})) ;;
        *)
            [[ "$shape" =~ ^([1-9][0-9]{0,2})x([1-9][0-9]{0,2})x([1-9][0-9]{0,2})$ ]] \
                || fail "$chip has no slice of $shape; shapes look like 4x4x8"
            a=${BASH_REMATCH[1]} b=${BASH_REMATCH[2]} c=${BASH_REMATCH[3]}
            chips=$((a * b * c))
            if [[ " $small " != *" $shape "* ]]; then
                ((a % 4 == 0 && b % 4 == 0 && c % 4 == 0 && a <= b && b <= c && chips <= most)) \
                    || fail "$chip has no slice of $shape; there are ${small// /, }, and" \
                        "multiples of 4 in rising order up to $most chips, such as 4x4x8"
            fi ;;
    esac
    # Slices of up to 8 chips in two dimensions are one host; all others have hosts of 4.
    chips_per_host=4
    [[ "$shape" == *x*x* ]] || [ "$chips" -gt 8 ] || chips_per_host=$chips
    hosts=$((chips / chips_per_host))
    machine+="-${chips_per_host}t"
    case "$chip" in
        v5e) accelerator_type="v5litepod-$chips" ;;
        v6e) accelerator_type="v6e-$chips" ;;
        *) accelerator_type="$chip-$((2 * chips))" ;;  # named by cores, two a chip
    esac
}

# TPU VMs are asked for by a number, which stands for the most compact shape.
check_named_by_number() {
    [[ "$shape" == *x*x* ]] && [ "$chips" -ge 64 ] || return 0
    local compact
    cube $((chips / 64))
    [ "$shape" = "$compact" ] \
        || fail "$accelerator_type is a slice of $compact, not $shape; launch/gke.sh has others"
}
