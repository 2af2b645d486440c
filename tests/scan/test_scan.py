"""One suite over all implementations, against the definition `dense`: values and gradients.

Kernels run on their own platform, and interpreted elsewhere. One program per implementation and
set of sizes; rows of a case differ in their resets.
"""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from bltjax.distributed.topology import read_topology
from bltjax.planning import aot
from bltjax.scan import IMPLEMENTATIONS, WAYS, fastest, selective_scan

NAMES = ("v", "step", "log_rates", "in", "out", "state")
OUTCOMES = ("y", "last", *NAMES)
TESTED = ("xla", "xla by trees", "pallas_tpu_interpreted")
# Positions, channels, states, and the resets of each row. The chunks of `xla` have 64 positions,
# those of the kernels 128; the kernels' registers 128 channels and 8 states.
CASES = {
    "documents": (150, 20, 5, [[0, 1, 7, 90], [], [0, 64, 128], [149]]),
    "two tiles": (130, 640, 8, [[0, 128], [5]]),
    "a chunk": (128, 3, 16, [[0, 127], [64]]),
    "one position": (1, 4, 2, [[0], []]),
    "a long row": (700, 8, 3, [[0, 300]]),
    "few": (40, 200, 3, [[0, 16], [23]]),
}


def arrays_of(name: str, dtype=jnp.float32):
    """v, step, log_rates, in, out, state; resets; weights of both outputs."""
    positions, channels, states, resets = CASES[name]
    random, rows = np.random.default_rng(0), len(resets)

    def normal(*shape, of=jnp.float32):
        return jnp.asarray(random.normal(size=shape), of)

    wide, narrow = (rows, positions, channels), (rows, positions, states)
    step = jax.nn.softplus(normal(*wide) - 2)
    step = step.at[:, ::11].set(0)  # which keeps the state, or only resets it
    given = (
        normal(*wide, of=dtype), step, 0.3 * normal(channels, states),
        normal(*narrow, of=dtype), normal(*narrow, of=dtype), normal(rows, channels, states),
    )  # fmt: skip
    resets_BN = np.zeros((rows, positions), bool)
    for row, at in enumerate(resets):
        resets_BN[row, at] = True
    return given, resets_BN, (normal(*wide), normal(rows, channels, states))


def outcome(implementation, given, resets_BN, weights):
    """y, the last state, and the gradients of a weighted sum of both."""
    implementation = implementation.partition(" ")[0]

    # Arrays are small: compiling takes most of the time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def value_and_gradients(*given):
        def loss(*given):
            *arrays, state = given
            found = selective_scan(*arrays, resets_BN, state, implementation=implementation)
            return sum((x * w).sum() for x, w in zip(found, weights, strict=True)), found

        return jax.grad(loss, argnums=range(len(NAMES)), has_aux=True)(*given)

    gradients, found = value_and_gradients(*given)
    return *found, *gradients


@functools.cache
def case(name: str):
    given = arrays_of(name)
    return given, outcome("dense", *given)


@pytest.fixture
def by_trees(request, monkeypatch):
    """Plain XLA as other devices than a CPU run it."""
    if request.getfixturevalue("implementation") == "xla by trees":
        xla = sys.modules["bltjax.scan.xla"]
        monkeypatch.setattr(xla, "one_by_one", xla.all_at_once)


def assert_close(found, expected, scale: float = 1.0):
    for name, ours, theirs in zip(OUTCOMES[: len(found)], found, expected, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        atol = scale * 2e-6 * max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=scale * 1e-5, err_msg=name)


@pytest.mark.usefixtures("by_trees")
@pytest.mark.parametrize(
    "implementation", [pytest.param("xla", marks=pytest.mark.smoke), *TESTED[1:]]
)
@pytest.mark.parametrize("name", CASES)
def test_matches_dense(name, implementation):
    given, expected = case(name)
    assert_close(outcome(implementation, *given), expected)


@pytest.mark.parametrize("implementation", ["dense", "xla", "pallas_tpu_interpreted"])
def test_bfloat16(implementation):
    """v, in and out in bfloat16, the rest in fp32: exactly as of those values in fp32, but that
    their gradients are rounded."""
    given, *rest = arrays_of("documents", jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in given)
    found, expected = outcome(implementation, given, *rest), outcome("dense", wide, *rest)
    assert [x.dtype for x in found[2:]] == [x.dtype for x in given]
    assert {x.dtype for x in found[:2]} == {jnp.dtype("float32")}
    assert_close(found[:2], expected[:2])
    assert_close(found, expected, scale=2e3)


@pytest.mark.parametrize("implementation", ["dense", "xla", "pallas_tpu_interpreted"])
def test_rows_in_pieces(implementation):
    """A row cut in two, whose first part's state the second begins with, is the whole row."""
    given, resets_BN, _ = arrays_of("documents")
    v, step, rates, into, out, state = given
    scan = functools.partial(selective_scan, implementation=implementation)
    whole, last = scan(v, step, rates, into, out, resets_BN, state)
    found = []
    for piece in (slice(0, 70), slice(70, None)):
        parts = (x[:, piece] for x in (v, step, into, out, resets_BN))
        v_, step_, into_, out_, resets_ = parts
        y, state = scan(v_, step_, rates, into_, out_, resets_, state)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_no_races(monkeypatch, capfd):
    """Two simulated cores, memory that starts as NaN, transfers that end as late as they may; tiles
    so small that there are several along each axis."""
    kernels = sys.modules["bltjax.scan.pallas_tpu"]
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "WIDEST", 128)
    given, expected = case("few")
    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(parameters):
        found = jax.block_until_ready(outcome("pallas_tpu", *given))
    assert_close(found, expected)
    assert "RACE" not in capfd.readouterr().out


def test_states_of_a_chunk_and_no_more():
    """Forward and backward, XLA's temporaries are a few times the inputs, which the definition's
    states of every position exceed by far."""
    N, I, U = 4096, 64, 16
    wide, narrow = (jax.ShapeDtypeStruct((1, N, size), jnp.float32) for size in (I, U))
    rates = jax.ShapeDtypeStruct((I, U), jnp.float32)

    def temporaries(implementation) -> int:
        def loss(*given):
            resets_BN = jnp.zeros((1, N), bool)
            return selective_scan(*given, resets_BN, implementation=implementation)[0].sum()

        step = jax.jit(jax.grad(loss, argnums=range(5)))
        compiled = step.lower(wide, wide, rates, narrow, narrow).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    states = 4 * N * I * U
    assert temporaries("xla") < states / 2 and temporaries("dense") > states


def test_mesh():
    """Rows and channels split over 8 devices, where divisible, give the result of one device."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from bltjax.config.run import MeshConfig
from bltjax.distributed.sharding import make_mesh
from bltjax.scan import selective_scan

random = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
for sizes, way, channels in (
    ((2, 2, 2), "pallas_tpu_interpreted", 6), ((1, 2, 4), "xla", 8), ((1, 4, 2), "xla", 3),
):
    given = draw(4, 40, channels), jax.nn.softplus(draw(4, 40, channels)), draw(channels, 3)
    given += draw(4, 40, 3), draw(4, 40, 3), jnp.asarray(random.random((4, 40)) < 0.1)

    def loss(*given, way):
        y, last = selective_scan(*given, implementation=way)
        return (y ** 2).mean() + (last ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=range(5)), static_argnames="way")
    expected = step(*given, way="dense")
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("fsdp"))
        placed = [x if x.ndim == 2 and x.dtype != bool else jax.device_put(x, rows) for x in given]
        lowered = step.lower(*placed, way=way)
        assert "manual_computation" in lowered.as_text(), sizes
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
                     lowered.compile()(*placed), expected)
print("equal")
"""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "equal", run.stderr


def test_choice_by_device():
    kinds = {"tpu": "pallas_tpu", "gpu": "xla", "cpu": "xla"}
    for platform, chosen in kinds.items():
        assert fastest(jax.sharding.AbstractDevice("x", None, platform=platform)) == chosen
    assert set(WAYS) | {"dense"} == {*IMPLEMENTATIONS, "pallas_tpu_interpreted"}


def test_refused():
    given, resets_BN, _ = arrays_of("one position")
    with pytest.raises(ValueError, match="'fast' is not one of dense, xla, pallas_tpu"):
        selective_scan(*given[:5], resets_BN, implementation="fast")
    with pytest.raises(ValueError, match=r"N \(.*\) is 2 in resets_BN but 1 in v_BNI"):
        selective_scan(*given[:5], np.zeros((2, 2), bool))


@pytest.mark.skipif(fastest(jax.devices()[0]) == "pallas_tpu", reason="the kernel runs here")
def test_no_kernel_falls_back():
    given, resets_BN, _ = arrays_of("one position")
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        selective_scan(*given[:5], resets_BN, implementation="pallas_tpu")


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SIZES = {  # rows, positions, channels, states, dtype
    "353M": (1, 8192, 2048, 16, jnp.bfloat16),
    "972M": (2, 1000, 3584, 16, jnp.bfloat16),
    "1.6B": (2, 2048, 4608, 16, jnp.float32),
    "small": (2, 100, 48, 5, jnp.float32),
}


@pytest.fixture(scope="module")
def devices():
    """From a chip's name to a device to compile for."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]' (Linux, x86-64)")
    with aot.no_cache():
        yield lambda chip: aot.described_devices(read_topology(TOPOLOGIES[chip]))[0]


def check_compiles(device, name: str):
    B, N, I, U, dtype = SIZES[name]
    sharding = SingleDeviceSharding(device)

    def described(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(*given):
        y, last = selective_scan(*given, implementation="pallas_tpu")
        return (y**2).sum() + (last**2).sum()

    narrow = described(B, N, U, dtype=dtype)
    given = (described(B, N, I, dtype=dtype), described(B, N, I), described(I, U), narrow, narrow)
    step = jax.jit(jax.value_and_grad(loss, argnums=range(5)))
    text = step.trace(*given, described(B, N, dtype=jnp.bool_)).lower().compile().as_text()
    for kernel in ("forward_kernel", "backward_kernel"):
        calls = re.findall(rf"^ .*selective_scan_{kernel}\S* = .* custom-call\(", text, re.M)
        assert len(calls) == 1, kernel
    # Nothing is larger than v in fp32, with whole tiles of channels and chunks of positions.
    shapes = re.findall(r"\b(?:pred|bf16|f32|s32)\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest <= B * -(-N // 128) * 128 * -(-I // 128) * 128


@pytest.mark.parametrize("name", ["353M", "small"])
def test_compiles_for_v5e(name, devices):
    check_compiles(devices("v5e"), name)


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", SIZES)
def test_compiles_for_every_chip(name, chip, devices):
    check_compiles(devices(chip), name)
