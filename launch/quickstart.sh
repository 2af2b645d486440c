#!/usr/bin/env bash
# Text to a trained Byte Latent Transformer on a laptop: byte LM, entropies, threshold, BLT, bits
# per byte, text. Stages that have finished are skipped when it is run again.
#   bash launch/quickstart.sh [--workdir DIR] [--text PATH]
# PATH is your own text, a file or a folder of *.txt; the default is the King James Bible.
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"
workdir="$repository/runs/quickstart"
text=()
absolute() {  # absolute PATH: as it is meant here, ~ expanded, for use from another folder
    [ -n "$1" ] || { echo "an empty path; give a folder, . for the working directory" >&2; exit 2; }
    python3 -c 'import os, sys
path = os.path.abspath(os.path.expanduser(sys.argv[1]))
if path.endswith("\n"):  # which the shell would drop
    sys.exit(f"{path!r} ends with a newline; give another name")
sys.stdout.buffer.write(os.fsencode(path))' "$1"
}
while [ $# -gt 0 ]; do
    case "$1" in
        --workdir) [ $# -ge 2 ] || { echo "--workdir needs a folder" >&2; exit 2; }
                   workdir="$(absolute "$2")"; shift 2 ;;
        --text) [ $# -ge 2 ] || { echo "--text needs a file or folder" >&2; exit 2; }
                path="$(absolute "$2")"; text=(--text "$path"); shift 2 ;;
        *) echo "usage: bash launch/quickstart.sh [--workdir DIR] [--text PATH]" >&2; exit 2 ;;
    esac
done
cd "$repository"
source launch/environment.sh quickstart
# A name that the runs below could not have is refused before the first of them.
python -c 'import sys
from bltjax.system.paths import check_arrays_path, path_of
try:
    check_arrays_path(path_of(sys.argv[1]))
except ValueError as error:
    sys.exit(f"--workdir: {error}")' "$workdir"
mkdir -p "$workdir/seconds"

stage() {  # stage NAME COMMAND...: run it once, and remember how long it took
    local name="$1" started=$SECONDS
    shift
    if [ -e "$workdir/seconds/$name" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    "$@"
    echo $((SECONDS - started)) > "$workdir/seconds/$name"
}
blt=(python -m bltjax)
records="$workdir/records"

stage text python launch/quickstart_text.py "$workdir/text" "${text[@]}"
stage train_byte_lm "${blt[@]}" train --config=configs/quickstart.py:byte_lm \
    --workdir="$workdir/byte_lm" \
    --config.data.train.text.path="$workdir/text/train/*.txt" \
    --config.data.eval.text.path="$workdir/text/held_out/*.txt"
for part in train held_out; do
    stage "entropies_$part" "${blt[@]}" entropies --byte_lm="$workdir/byte_lm" \
        --source="$workdir/text/$part/*.txt" --split_bytes=1000 --out="$records/$part"
done
stage calibrate "${blt[@]}" calibrate --records="$records/train" --mean=4.5 \
    --out="$workdir/threshold.txt"
stage train_blt "${blt[@]}" train --config=configs/quickstart.py:blt --workdir="$workdir/blt" \
    --config.entropy_model="$workdir/byte_lm" \
    --config.patching.threshold="$(cat "$workdir/threshold.txt")" \
    --config.data.train.text.path="$records/train" \
    --config.data.eval.text.path="$records/held_out"
stage evaluate_byte_lm "${blt[@]}" evaluate --workdir="$workdir/byte_lm" \
    --out="$workdir/evaluation_byte_lm.json"
stage evaluate_blt "${blt[@]}" evaluate --workdir="$workdir/blt" --compressors \
    --out="$workdir/evaluation_blt.json"
prompt=()
[ ${#text[@]} -gt 0 ] || prompt=(--prompt "And it came to pass")
stage generate "${blt[@]}" generate --workdir="$workdir/blt" --max_bytes=200 --temperature=0.7 \
    "${prompt[@]}"
works=("$workdir"/text/held_out/*.txt)
stage picture "${blt[@]}" patches --workdir="$workdir/blt" --file="${works[0]}" --limit=480 \
    --scheme=entropy --scheme=space --scheme=static \
    --png="$workdir/patches.png" --html="$workdir/patches.html"
stage page "${blt[@]}" page "$workdir/blt"
python launch/quickstart_report.py "$workdir"
