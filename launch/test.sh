#!/usr/bin/env bash
# Lint, format check and tests on a fresh machine; sets up what it needs.
#   bash launch/test.sh          about a quarter of an hour on 2 cores after installation
#   bash launch/test.sh --all    the slow tests too
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
python -m pytest "${selection[@]}"
