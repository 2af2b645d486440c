# shellcheck shell=bash
# Sourced by the launch scripts: a Python with bltjax and the named extras. An active virtual
# environment is used as it is; otherwise .venv in the repository is made once and kept.
# Usage: source launch/environment.sh EXTRA[,EXTRA...]
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv"
        python3 -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
# Installed again only when the requirements have changed since.
stamp="$VIRTUAL_ENV/.bltjax-$1"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "installing bltjax[$1] into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
fi
# On a CPU every step needs the same large temporaries. Kept in one heap and on huge pages, they
# are not given back to the system and faulted in again at every step.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592}"
# libtpu, with which the tests compile, searches long and loudly for a TPU where there is none.
if ! ls /dev/accel* /dev/vfio/* /dev/nvidia* > /dev/null 2>&1; then
    export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
fi
