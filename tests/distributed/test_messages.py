"""Known messages of other libraries, each provoked: the library itself raises the error here."""

import contextlib
import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import test_checkpoint
from faults import can_mount
from jax.sharding import SingleDeviceSharding
from private_names import forget_devices

from bltjax.data.records import encode_record, write_shard
from bltjax.distributed.messages import KNOWN_MESSAGES, OWN_FAULTS, disk_is_full, says
from bltjax.distributed.processes import describe, lost_another
from bltjax.distributed.topology import read_topology
from bltjax.planning import aot

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
from local_pod import free_port  # noqa: E402

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
needs_mount = pytest.mark.skipif(not can_mount(), reason="a small disk needs mount, as root")


def no_cluster(monkeypatch):
    forget_devices(monkeypatch)
    jax.distributed.initialize()


def out_of_memory(_):
    jnp.zeros(2**50, jnp.uint8).block_until_ready()


def invalid_argument(_):
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options={"xla_no_such_option": 1})


def not_found(_):
    call = jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct((2,), jnp.float32))
    jax.jit(call)(jnp.zeros(2)).block_until_ready()


def on_v5e(function, *shape: int) -> None:
    """Compiles a function of one array for an absent TPU."""
    sharding = SingleDeviceSharding(aot.described_devices(read_topology("v5e:1x1"))[0])
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    with aot.no_cache():
        jax.jit(function).lower(argument).compile()


def unimplemented(_):
    precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # of NVIDIA's GPUs
    on_v5e(lambda x: jnp.dot(x, x, precision=precision), 8, 8)


def larger_than_a_chip(_):
    on_v5e(lambda x: x + 1, 2**17, 2**17)


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder]
    subprocess.run(words, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def save_array(folder: Path) -> None:
    """Saves like a checkpoint: tensorstore writes, on threads of its own."""
    with ocp.StandardCheckpointer() as checkpointer:
        random = np.random.default_rng(0).integers(0, 255, 2**20, np.uint8)
        checkpointer.save(folder / "params", {"leaf": jnp.asarray(random)})


def save_records(folder: Path) -> None:
    random = np.random.default_rng(0).bytes(2**20)
    write_shard(folder / "shard", [encode_record(random, np.zeros(2**20 + 1, np.float32))])


DYING = """
import json, os, sys, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=100)
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
rows = jax.make_array_from_callback((2,), sharding, lambda _: np.ones(1, np.float32))
total = jax.jit(lambda x: x.sum())
assert total(rows) == 2
if index:
    os._exit(0)
try:
    for _ in range(100):
        total(rows).block_until_ready()
except (ValueError, jax.errors.JaxRuntimeError) as error:
    print(json.dumps([type(error).__name__, str(error)]), flush=True)
os._exit(0)
"""


def broken_collective(_):
    port = str(free_port())
    words = [sys.executable, "-c", DYING, port]
    first, second = (
        subprocess.Popen([*words, index], stdout=subprocess.PIPE, text=True) for index in "01"
    )
    try:
        printed = first.communicate(timeout=120)[0]
    finally:
        first.kill()
        second.kill()
        second.communicate()
    kind, text = json.loads(printed.splitlines()[-1])  # gloo prints too
    raise {"ValueError": ValueError, "JaxRuntimeError": jax.errors.JaxRuntimeError}[kind](text)


PROVOKED = {
    "no cluster": (no_cluster, ValueError),
    "out of memory": (out_of_memory, jax.errors.JaxRuntimeError),
    "invalid argument": (invalid_argument, jax.errors.JaxRuntimeError),
    "not found": (not_found, jax.errors.JaxRuntimeError),
    "unimplemented": (unimplemented, jax.errors.JaxRuntimeError),
    "larger than a chip": (larger_than_a_chip, jax.errors.JaxRuntimeError),
    "broken collective": (broken_collective, (ValueError, jax.errors.JaxRuntimeError)),
}
MARKS = {
    "unimplemented": needs_libtpu,
    "larger than a chip": needs_libtpu,
    "broken collective": pytest.mark.slow,
}
# Tests of tests/training/test_checkpoint.py that provoke messages of reading a checkpoint.
READING = {
    "storage away": "test_a_storage_that_is_away_is_no_damage",
    "storage refuses": "test_what_may_not_be_read_is_not_damaged",
    "damaged files": "test_what_is_damage",
}
WRITERS = {"tensorstore": save_array, "array_record": save_records}


def test_every_known_message_is_provoked():
    assert PROVOKED.keys() | {"disk full"} | READING.keys() == KNOWN_MESSAGES.keys()
    assert all(callable(getattr(test_checkpoint, name)) for name in READING.values())
    assert KNOWN_MESSAGES["disk full"].library == ", ".join(WRITERS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, ())) for n in PROVOKED])
def test_a_library_says_so(name, monkeypatch):
    provoke, kind = PROVOKED[name]
    with pytest.raises(kind) as raised:
        provoke(monkeypatch)
    assert says(raised.value, name), raised.value
    # In a run of several processes it is this one's fault, or another's that was lost.
    monkeypatch.setattr("bltjax.distributed.processes.joined", lambda: True)
    assert lost_another(raised.value) == (name == "broken collective")
    own = name in OWN_FAULTS or name == "larger than a chip"
    assert bool(says(raised.value, *OWN_FAULTS)) == own


@needs_mount
@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk(library, tmp_path):
    with small_disk(tmp_path, 256), pytest.raises((ValueError, OSError, RuntimeError)) as raised:
        WRITERS[library](tmp_path)
    assert says(raised.value, "disk full")
    assert describe(raised.value).startswith("the disk is full")


def test_a_full_disk_by_its_number():
    with pytest.raises(OSError) as raised, open("/dev/full", "w", encoding="utf-8") as file:
        file.write("text")
    assert disk_is_full(raised.value)
    assert disk_is_full(OSError(errno.ENOSPC, "Auf dem Gerät ist kein Speicherplatz mehr frei"))
    assert not disk_is_full(OSError(errno.EACCES, "Permission denied"))


@needs_libtpu
def test_how_much_too_large_a_program_is():
    with pytest.raises(aot.TooLarge) as raised:
        sharding = SingleDeviceSharding(aot.described_devices(read_topology("v5e:1x1"))[0])
        argument = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32, sharding=sharding)
        aot.compile_ahead(jax.jit(lambda x: x + 1).lower(argument))
    assert 64 * 2**30 <= raised.value.needed <= 128 * 2**30
