# shellcheck shell=bash
# Sourced by the launch scripts: a Python with bltjax and the named extras.
# Usage: source launch/environment.sh EXTRA[,EXTRA...] [PYTHON [oldest]]
# An active virtual environment is used as it is; otherwise .venv in the repository is made once and
# kept. With PYTHON, a path or a name on PATH, it is that Python's own environment (.venv-3.13), and
# with `oldest` the one with the lowest versions that pyproject.toml allows (.venv-3.11-oldest).

bltjax_version() {  # bltjax_version PYTHON: 3.12, or nothing if it does not start
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || true
}

bltjax_runs_on() {  # bltjax_runs_on PYTHON: whether it starts and is new enough
    case "$(bltjax_version "$1")" in
        3.1[1-9] | 3.[2-9][0-9]) return 0 ;;
        *) return 1 ;;
    esac
}

bltjax_on_path() {  # bltjax_on_path NAME: the first of that name that will do
    local path
    # One that refuses, as a version manager's may, can stand before one that starts.
    while read -r path; do
        if bltjax_runs_on "$path"; then
            echo "$path"
            return 0
        fi
    done < <(type -aP "$1" || true)
    return 1
}

bltjax_python() {  # the first Python on PATH that will do
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if bltjax_on_path "$name"; then return 0; fi
    done
    echo "bltjax needs Python 3.11, 3.12 or 3.13. On PATH, python3 is" \
        "$(bltjax_describe python3), and there is no python3.13, python3.12 or python3.11 that" \
        "starts. Install one of them." >&2
    return 2
}

bltjax_describe() {
    local version
    version="$(bltjax_version "$1")"
    if [ -n "$version" ]; then echo "Python $version"; else echo "no Python that starts"; fi
}

bltjax_has_pip() {
    "$1" -c 'import pip' 2> /dev/null || "$1" -m ensurepip > /dev/null 2>&1
}

bltjax_environment() {
    local extras="$1" python="${2:-}" oldest="${3:-}" folder stamp constraints=()
    if [ -z "$python" ] && [ -n "${VIRTUAL_ENV:-}" ] && bltjax_runs_on "$VIRTUAL_ENV/bin/python"; then
        folder="$VIRTUAL_ENV"
    else
        if [ -z "$python" ] && [ -n "${VIRTUAL_ENV:-}" ]; then
            echo "not in the active $VIRTUAL_ENV, which has" \
                "$(bltjax_describe "$VIRTUAL_ENV/bin/python"); bltjax needs 3.11 or newer" >&2
        fi
        folder="$PWD/.venv"
        if [ -n "$python" ]; then
            if ! python="$(bltjax_on_path "$2")"; then
                echo "$2 is $(bltjax_describe "$2"); bltjax needs Python 3.11 or newer" >&2
                return 2
            fi
            folder="$PWD/.venv-$(bltjax_version "$python")${oldest:+-oldest}"
        fi
        # One whose Python was removed is made anew; one that was cut off before it had pip gets it.
        if ! bltjax_runs_on "$folder/bin/python" || ! bltjax_has_pip "$folder/bin/python"; then
            [ -n "$python" ] || python="$(bltjax_python)" || return
            echo "making ${folder##*/} with $(bltjax_describe "$python")"
            "$python" -m venv --clear "$folder" || return
        fi
        unset PYTHONHOME
    fi
    # Not by its script `activate`, which has the name of the folder in which it was made.
    export VIRTUAL_ENV="$folder" PATH="$folder/bin:$PATH"
    # Installed again only when the requirements, or the repository's place, have changed since.
    stamp="$folder/.bltjax-$extras"
    if [ "$(cat "$stamp" 2> /dev/null)" != "$PWD" ] || [ pyproject.toml -nt "$stamp" ]; then
        echo "installing bltjax[$extras] into $folder"
        if [ -n "$oldest" ]; then
            constraints=(--constraint "$folder/oldest.txt")
            "$folder/bin/python" launch/oldest.py > "$folder/oldest.txt" || return
        fi
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
            ${constraints[@]+"${constraints[@]}"} --editable ".[$extras]" || return
        echo "$PWD" > "$stamp" || return
    fi
    # libtpu, with which the tests compile, searches long and loudly for a TPU where there is none.
    if ! ls /dev/accel* /dev/vfio/* /dev/nvidia* > /dev/null 2>&1; then
        export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
    fi
}

bltjax_environment "$@"
