"""The environment of a program, before jax starts: variables, streams, memory.

A program computes the same numbers and writes the same files wherever it is started. So settings of
the environment that would change them are overridden, with a log line; those that can't be
overridden are refused before any work is done. Variables that only choose a device, a precision or
a diagnosis are the user's, and are kept.

This file imports no jax: jax reads most of its variables once, when it is imported.
"""

import codecs
import contextlib
import ctypes
import glob
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

FALSE = {"", "n", "no", "f", "false", "off", "0"}
TRUE = {"y", "yes", "t", "true", "on", "1"}
# Variables of jax that change numbers or types of arrays, or stop a program on good data (masks are
# infinite on purpose, texts go to the device unasked), with the values that change nothing.
OVERRULED = {
    "JAX_ENABLE_X64": FALSE,
    "JAX_EXPLICIT_X64_DTYPES": {"warn"},
    "JAX_DEFAULT_DTYPE_BITS": {"64"},
    "JAX_DEFAULT_PRNG_IMPL": {"threefry2x32"},
    "JAX_ENABLE_CUSTOM_PRNG": FALSE,
    "JAX_THREEFRY_PARTITIONABLE": TRUE,
    "JAX_RANDOM_SEED_OFFSET": {"0"},
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": FALSE,
    "JAX_NUMPY_DTYPE_PROMOTION": {"standard"},
    "JAX_NUMPY_RANK_PROMOTION": {"allow"},
    "JAX_DISABLE_JIT": FALSE,
    "JAX_DEBUG_INFS": FALSE,
    "JAX_TRANSFER_GUARD": {"allow"},
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": {"allow"},
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": {"allow"},
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": {"allow"},
}
PROBE = "from jaxlib.xla_client import make_cpu_client; make_cpu_client()"
# Replacements for letters that a stream lacks, where the escape would be hard to read.
PLAIN = {"█": "#", "␣": "_", "↵": "\\n", "→": "\\t", "␡": "\\x7f"}
PLAIN |= {chr(0x2400 + code): f"\\x{code:02x}" for code in range(32)}
# mallopt's names for numbers, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def prepare_process() -> None:
    """Makes streams able to print any text, and removes variables that this process must not
    follow."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="bltjax.plain")
    if "jax" in sys.modules:  # jax has already read them; its importer decides
        return
    for name, harmless in OVERRULED.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in harmless:
            del os.environ[name]
            print(
                f"bltjax: {name}={value} is overridden: it changes numbers, or stops programs",
                file=sys.stderr,
            )


def plain(error: UnicodeError) -> tuple[str, int]:
    """The replacement for letters that a stream's encoding lacks: a sign, or an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = (PLAIN.get(x) or x.encode("ascii", "backslashreplace").decode() for x in lacking)
    return "".join(shown), error.end


codecs.register_error("bltjax.plain", plain)


def check_flags() -> None:
    """Tries XLA_FLAGS in a process of its own, since XLA aborts on unknown flags.

    Raises:
      ValueError: with XLA's reason, which names the flag.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if not flags:
        return
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=60, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return  # not about the flags
    if probe.returncode == 0 or not re.search("XLA_FLAGS|Flag", probe.stderr):
        return
    reasons = re.findall(r"^[EF]\d{4} .*?\] (.*)$", probe.stderr, re.MULTILINE)
    reason = reasons[0] if reasons else probe.stderr.strip().splitlines()[0]
    raise ValueError(
        f"XLA would abort at XLA_FLAGS={flags}: {reason.strip().rstrip('.')}. (Flags of a TPU's"
        " compiler belong in LIBTPU_INIT_ARGS.)"
    )


def check_platform() -> None:
    """Starts jax's devices, for functions that a notebook calls.

    Raises:
      ValueError: if the platform requested by the environment is missing.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if line := refused_platform(error):
            raise ValueError(line) from error
        raise


def refused_platform(error: BaseException) -> str | None:
    """A line for jax's error that a platform requested by the environment is missing, or None.

    Code that met that error first, for example while reading a file, may have wrapped it.
    """
    asked = next((n for n in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(n)), None)
    if asked is None:
        return None
    cause = error.__cause__ or error.__context__
    if cause and (line := refused_platform(cause)):
        return line
    frames = traceback.extract_tb(error.__traceback__)
    reason = str(error).removesuffix(
        " (set JAX_PLATFORMS='' to automatically choose an available backend)"
    )
    # jax asserts that some platform was found.
    by_jax = bool(frames) and Path(frames[-1].filename).name == "xla_bridge.py"
    bare = isinstance(error, AssertionError) and by_jax
    if not bare and not re.match(r"Unable to initialize backend|Unknown backend", reason):
        return None
    there = available_platform()
    return (
        f"{asked}={os.environ[asked]} can't be used here"
        + (f" ({' '.join(reason.split())})" if reason else "")
        + (f"; without {asked} jax would run on {there}" if there else "")
    )


def available_platform() -> str:
    """jax's default platform; empty if it can't be determined."""
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")}
    try:
        probe = subprocess.run(
            [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=120, env=kept,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return probe.stdout.decode(errors="replace").strip()


def check_numbers(what: str) -> None:
    """Checks jax's settings for functions that a notebook calls: none may change their numbers.

    what: the function's name; `train` also needs types of 32 bits.

    Raises:
      ValueError: naming jax's setting and how to change it.
    """
    import jax

    needed = {"jax_numpy_dtype_promotion": "standard"}
    if what == "train":
        needed["jax_enable_x64"] = False
    for name, value in needed.items():
        if (found := getattr(jax.config, name)) != value:
            raise ValueError(
                f"{what} does not work with {name} {found!s}:"
                f" jax.config.update({name!r}, {value!r}), or unset {name.upper()}"
            )


def random_key(seed):
    """A key of one fixed kind of random numbers, whatever jax's default is."""
    import jax

    return jax.random.key(seed, impl="threefry2x32")


def keep_buffers() -> bool:
    """Makes the C library keep large freed buffers for the next step; returns whether it does.

    On a CPU every step needs the same large temporaries. By default glibc returns them to the
    system and faults them in again, page by page, at every step. An accelerator has memory of its
    own, and a user's own settings of malloc are kept.
    """
    own = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if own or sys.platform != "linux" or not on_cpu():
        return False
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
        mallopt = ctypes.CDLL(None).mallopt
    except (ValueError, OSError, AttributeError):
        return False  # another C library
    # One heap for all threads and sizes, never trimmed (-1 is the largest size).
    settings = ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, -1), (M_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def on_cpu() -> bool:
    """Whether jax will compute on a CPU, as far as is known before it starts."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked.split(",")[0] == "cpu"
    devices = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    return not any(glob.glob(pattern) for pattern in devices)


def cache_folders() -> list[Path]:
    """Candidate folders for this user's caches, the best first; none of them need exist."""
    found = []
    if named := os.environ.get("BLTJAX_CACHE"):
        found.append(Path(named).expanduser())
    elif (xdg := os.environ.get("XDG_CACHE_HOME", "")).startswith("/"):  # by the XDG rules
        found.append(Path(xdg) / "bltjax")
    else:
        with contextlib.suppress(RuntimeError):  # a user without a home
            found.append(Path.home() / ".cache" / "bltjax")
    user = os.getuid() if hasattr(os, "getuid") else "cache"
    return [*found, Path(tempfile.gettempdir()) / f"bltjax-{user}"]
