#!/usr/bin/env bash
# Lint, format check and tests on a fresh machine; sets up what it needs.
#   bash launch/test.sh          after installation six minutes of 2 cores, of slow ones fifteen
#   bash launch/test.sh --smoke  the least, under a minute
#   bash launch/test.sh --all    the slow tests too: 47 minutes, of slow cores over an hour; then the
#                                default suite on each other supported Python that PATH has
# With --python PATH it all runs on another Python, in an environment of its own (.venv-3.13), and
# with --oldest on the lowest versions that pyproject.toml allows (python3.11, unless --python says
# otherwise).
set -euo pipefail
usage="usage: bash launch/test.sh [--smoke | --all] [--python PATH] [--oldest]"
tier=default python="" oldest=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke | --all)
            [ "$tier" = default ] || { echo "$usage" >&2; exit 2; }
            tier="${1#--}"; shift ;;
        --python)
            [ $# -ge 2 ] || { echo "--python needs a path" >&2; exit 2; }
            # Before the folder changes; a name without a slash is looked for on PATH.
            python="$2"; shift 2
            case "$python" in /*) ;; */*) python="$PWD/$python" ;; esac ;;
        --oldest) oldest=oldest; shift ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."
[ -z "$oldest" ] || python="${python:-python3.11}"
case "$tier" in
    smoke) selection=(-m smoke) extras=test ;;
    default) selection=(-m "not slow") extras=test ;;
    all) selection=(--seed random) extras=test,parity,notebook ;;
esac
# Most of the time is compilation. LLVM optimises nothing in the first two, so that only --all runs
# the code that users run.
[ "$tier" = all ] || export JAX_DISABLE_MOST_OPTIMIZATIONS=true
# shellcheck disable=SC1091 # checked by itself
source launch/environment.sh "$extras" "$python" "$oldest"
python - << 'PROGRAM'
import platform
from importlib.metadata import version

names = ("jax", "jaxlib", "flax", "orbax-checkpoint")
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in names), sep="  ")
PROGRAM
failed=()
check() {  # check NAME COMMAND...: what failed is said at the end
    "${@:2}" || failed+=("$1")
}
check "ruff format" ruff format --check .
check "ruff" ruff check .
# Two workers, for much of what the tests wait for is one thread: compilation. Tests of one file share
# what they make, so they stay together; files of few tests take as long as others, and must not come
# last.
check "tests" python -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${selection[@]+"${selection[@]}"}
if [ "$tier" = all ]; then
    for version in 3.11 3.12 3.13; do
        [ "$version" != "$(bltjax_version python)" ] || continue
        if ! found="$(bltjax_on_path "python$version")"; then
            echo "== Python $version: none on PATH starts; left out"
            continue
        fi
        echo "== Python $version: $found"
        check "Python $version" bash launch/test.sh --python "$found"
    done
fi
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed:'; printf ' %s,' "${failed[@]}"; echo
    exit 1
fi
