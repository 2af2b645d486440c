#!/usr/bin/env bash
# Compiles the training steps of the table of plans in bltjax/benchmark/README.md, one after the
# other, and prints the table. No TPU is needed; an 8B takes six to eight minutes of a core and 7 GB
# of memory. Run it again to resume: a plan that lies in the work directory isn't compiled anew.
#   bash launch/plan_all.sh [--workdir DIR] [--only WORD]
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=runs/plans only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --workdir) workdir="$2"; shift 2 ;;
        --only) only="$2"; shift 2 ;;
        *) echo "usage: bash launch/plan_all.sh [--workdir DIR] [--only WORD]" >&2; exit 2 ;;
    esac
done
# shellcheck disable=SC1091
source launch/environment.sh tpu
mkdir -p "$workdir"
# The 8Bs take the paper's 16M bytes a step, in as many micro-batches as leave a chip a row or four;
# the first and the last compare what chips send on 64 and on 512, with as many rows on each.
plans=(
    "8b-v5p-64   configs/blt.py:8b v5p:4x4x4 1 mesh.data=1 mesh.fsdp=64"
    "1b-v5e-16   configs/blt.py:1b v5e:4x4   1 mesh.data=1 mesh.fsdp=16 optimizer.grad_accum_steps=64"
    "1b-v6e-16   configs/blt.py:1b v6e:4x4   1 mesh.data=1 mesh.fsdp=16 optimizer.grad_accum_steps=32"
    "8b-v5e-256  configs/blt.py:8b v5e:16x16 1 mesh.data=1 mesh.fsdp=256"
    "8b-v6e-64   configs/blt.py:8b v6e:8x8   1 mesh.data=1 mesh.fsdp=64 optimizer.grad_accum_steps=16"
    "8b-long-64  configs/blt.py:8b v5p:4x4x4 1 mesh.data=1 mesh.fsdp=64 optimizer.grad_accum_steps=2 data.batch_size=128 data.seq_len=131072 data.max_patches=32768"
    "8b-2v5e-512 configs/blt.py:8b v5e:16x16 2 mesh.data=2 mesh.fsdp=256 optimizer.grad_accum_steps=2"
    "8b-v5p-512  configs/blt.py:8b v5p:8x8x8 1 mesh.data=8 mesh.fsdp=64 data.batch_size=8192"
    "megabyte-v5e-16  configs/rivals.py:megabyte v5e:4x4 1"
    "spacebyte-1b-v5e-16  configs/rivals.py:spacebyte_1b v5e:4x4 1"
    "mambabyte-972m-v5e-16  configs/rivals.py:mambabyte_972m v5e:4x4 1"
    "byt5-large-v5e-16  configs/rivals.py:byt5_large v5e:4x4 1"
    "canine-v5e-16  configs/rivals.py:canine v5e:4x4 1"
    "llama-1b-v5e-16  configs/rivals.py:llama_1b v5e:4x4 1"
    "llama-8b-v5e-64  configs/rivals.py:llama_3_8b v5e:8x8 1"
)
chosen=()
for plan in "${plans[@]}"; do
    [[ "${plan%% *}" == *"$only"* ]] && chosen+=("$plan")
done
started=$SECONDS compiled=0 missing=0
for plan in "${chosen[@]}"; do
    [ -s "$workdir/${plan%% *}.json" ] || missing=$((missing + 1))
done
for plan in "${chosen[@]}"; do
    read -r name config topology slices settings <<<"$plan"
    [ -s "$workdir/$name.json" ] && continue
    left=""
    if [ "$compiled" -gt 0 ]; then
        left=", about $(((SECONDS - started) * (missing - compiled) / compiled / 60)) minutes left"
    fi
    echo "$name: $((compiled + 1)) of $missing$left" >&2
    options=()
    for setting in $settings; do options+=("--config.$setting"); done
    # A plan that doesn't fit (exit status 1) still writes what it found; an error writes nothing.
    python -m bltjax plan --config="$config" --topology="$topology" --slices="$slices" --json \
        "${options[@]}" >"$workdir/.$name.partial" || [ -s "$workdir/.$name.partial" ]
    mv "$workdir/.$name.partial" "$workdir/$name.json"
    compiled=$((compiled + 1))
done
files=()
for plan in "${chosen[@]}"; do files+=("$workdir/${plan%% *}.json"); done
python launch/plan_table.py "${files[@]}"
