#!/usr/bin/env bash
# Lint, format check and tests on a fresh machine; sets up what it needs.
#   bash launch/test.sh          after installation ten minutes of 2 cores, of slow ones twenty
#   bash launch/test.sh --all    the slow tests too: 47 minutes, of slow cores over an hour
set -euo pipefail
cd "$(dirname "$0")/.."
selection=(-m "not slow") extras=test
for argument in "$@"; do
    case "$argument" in
        --all) selection=(); extras=test,parity,notebook ;;
        *) echo "usage: bash launch/test.sh [--all]" >&2; exit 2 ;;
    esac
done
source launch/environment.sh "$extras"
ruff format --check .
ruff check .
# Two workers, for much of what the tests wait for is one thread: compilation. Tests of one file share
# what they make, so they stay together.
python -m pytest -n 2 --dist loadfile "${selection[@]}"
