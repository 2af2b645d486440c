"""One suite over all implementations, against the definition `dense`: values and gradients.

Kernels run on their own platform, and interpreted elsewhere. The random case draws its shapes from
a seed that it prints.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import bltjax.attention.tiled as tiled
from bltjax.attention import IMPLEMENTATIONS, KERNELS, fastest, range_attention
from bltjax.attention.dense import dense
from bltjax.attention.pallas import gpu, tpu
from bltjax.attention.pallas.tpu import TpuPlan
from bltjax.attention.pattern import Blocks, Pooling, Reading, Sliding, Whole
from bltjax.attention.staircase import Tiles, whole_patches
from bltjax.config.run import ATTENTION

pytestmark = pytest.mark.usefixtures("by_tiles")
N = 150
HERE = fastest(jax.devices()[0])
TESTED = tuple(
    name
    for name in KERNELS
    if name == HERE or (name.endswith("_interpreted") and not name.startswith(HERE))
)


def cuts(kind: str, random) -> np.ndarray:
    """Patch starts of a row of N bytes."""
    return {
        "ones": np.arange(N),
        "giant": np.array([0, 1]),
        "one": np.array([0]),
        "alternating": np.array([0, 1, 90, 91, 149]),
        "ragged": np.unique(np.append(0, random.integers(1, N, 40))),
    }[kind]


KINDS = ("ones", "giant", "one", "alternating", "ragged")


def patch_ranges(kinds, patches, slots, random):
    """Ranges of a pooling attention, [B, P * K], patches beyond the last one empty at the end."""
    start, end = [], []
    for kind in kinds:
        begins = cuts(kind, random)[:patches]
        ends = np.append(begins[1:], N)
        missing = patches - len(begins)
        start.append(np.repeat(np.append(begins, [N] * missing), slots))
        end.append(np.repeat(np.append(ends, [N] * missing), slots))
    return np.array(start), np.array(end)


def read_ranges(kinds, slots, random):
    """Ranges of a reading attention, [B, N]: each byte reads the patch before its own."""
    patch = np.array([np.searchsorted(cuts(k, random), np.arange(N), "right") - 1 for k in kinds])
    start = np.maximum(patch - 1, 0) * slots
    return start, start + slots


def cases():
    random = np.random.default_rng(0)
    for slots in (1, 3):
        yield f"pooling K={slots}", Pooling(slots), N, *patch_ranges(KINDS, N, slots, random), 2, 2
    index = np.tile(np.arange(N), (len(KINDS), 1))
    begins = [cuts(kind, random) for kind in KINDS]
    document = np.array([np.repeat(b, np.diff(np.append(b, N))) for b in begins])
    for window, shared in ((16, 4), (50, 2), (200, 1)):
        start = np.maximum(index - window + 1, document)
        end = index + 1
        start[0, 140:], end[0, 140:] = 140, 140  # padding sees nothing
        yield f"window {window} J={shared}", Sliding(window), N, start, end, 4, shared
    after = np.array([np.repeat(np.append(b[1:], N), np.diff(np.append(b, N))) for b in begins])
    block = document + (index - document) // 16 * 16
    for pattern, start, end in (
        (Whole(), document.copy(), after.copy()),
        (Blocks(16), block, np.minimum(block + 16, after)),
    ):
        start[0, 140:], end[0, 140:] = 140, 140
        yield f"{type(pattern).__name__.lower()} of documents", pattern, N, start, end, 4, 2
    start = np.sort(random.integers(0, 60, (len(KINDS), N)), axis=1)
    yield "whole, few keys", Whole(), 60, start, np.minimum(start + 20, 60), 2, 1
    carried = 24  # keys before the first query
    start = np.maximum(index + carried - 24, 0)
    yield "window 25 carried", Sliding(25), N + carried, start, index + carried + 1, 2, 2
    for slots in (2, 3):
        reads = np.sort(random.integers(0, 40, index.shape), axis=1)
        full = np.where(index < 140, slots, 0)
        start = np.where(index < 140, reads, 40) * slots
        yield f"reading K={slots}", Reading(slots), 40 * slots, start, start + full, 2, 2
    yield "reading patches", Reading(3), N * 3, *read_ranges(KINDS, 3, random), 2, 2
    nothing = np.zeros_like(index)
    yield "nothing seen", Pooling(3), N, nothing, nothing, 2, 1


CASES = {case[0]: case[1:] for case in cases()}


def tensors(start, keys, heads, shared, channels=8, dtype=jnp.float32, seed=1):
    """q, k, v and a weight for each output."""
    rows, queries = start.shape
    random = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(random.normal(size=(rows, length, count, channels)), dtype)
        for length, count in ((queries, heads), (keys, shared), (keys, shared), (queries, heads))
    )


def outcome(implementation, pattern, start, end, q, k, v, weight):
    """Output, and gradients of q, k and v."""
    start, end = jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)

    # Arrays are small: compiling takes most of the time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def value_and_gradients(q, k, v, start, end):
        def loss(q, k, v):
            out = range_attention(
                q, k, v, start, end, pattern=pattern, implementation=implementation
            )
            return (out * weight).sum(dtype=jnp.float32), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    gradients, out = value_and_gradients(q, k, v, start, end)
    return out, *gradients


@functools.cache
def case(name: str):
    """Arguments for `outcome`, and the expected result."""
    pattern, keys, start, end, heads, shared = CASES[name]
    given = (pattern, start, end, *tensors(start, keys, heads, shared))
    return given, outcome("dense", *given)


def assert_close(found, expected, start, end, scale=1.0):
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        atol = scale * (5e-6 if name == "out" else 2e-5)
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=scale * 1e-5, err_msg=name)
    empty = np.asarray(start == end)
    assert not np.asarray(found[0])[empty].any(), "an empty range must give zeros"
    assert not np.asarray(found[1])[empty].any(), "an empty range must have no gradient"


@pytest.mark.parametrize("implementation", [pytest.param("xla", marks=pytest.mark.smoke), *TESTED])
@pytest.mark.parametrize("name", CASES)
def test_matches_dense(name, implementation):
    given, expected = case(name)
    assert_close(outcome(implementation, *given), expected, *given[1:3])


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few positions, so that a short row has many of them."""

    def plan_of_tpu(pattern, queries, keys, shared, group, head):
        query_slots = pattern.slots if isinstance(pattern, Pooling) else 1
        key_slots = pattern.slots if isinstance(pattern, Reading) else 1
        tiles = Tiles(whole_patches(24, 8, query_slots), whole_patches(16, 8, key_slots))
        crosses = isinstance(pattern, Pooling | Reading)
        held = 0 if crosses else queries + -queries % tiles.queries
        return TpuPlan(pattern, tiles, group, shared, held)

    monkeypatch.setattr(tpu, "kernel_plan", plan_of_tpu)
    monkeypatch.setattr(gpu, "tile_sizes", lambda *_: (Tiles(32, 16), Tiles(16, 32)))


def random_case(random):
    """A pattern, its ranges with gaps and empty ranges anywhere, and the other sizes."""
    rows, slots = random.integers(1, 4), int(random.integers(1, 5))
    shared, group = random.integers(1, 3), random.integers(1, 4)
    kind = random.choice(["pooling", "reading", "sliding", "whole", "blocks"])
    keys = int(random.integers(1, 120))
    queries = int(random.integers(1, 120))
    if kind == "pooling":
        runs = -(-queries // slots)
        edges = np.sort(random.integers(0, keys + 1, (rows, 2 * runs)), axis=1)
        start, end = (np.repeat(x, slots, axis=1) for x in (edges[:, ::2], edges[:, 1::2]))
        pattern = Pooling(slots)
    elif kind == "reading":
        groups = -(-keys // slots)
        keys = groups * slots
        start = np.sort(random.integers(0, groups, (rows, queries)), axis=1) * slots
        end = start + slots
        pattern = Reading(slots)
    elif kind == "whole":
        edges = np.sort(random.integers(0, keys + 1, (2, rows, queries)), axis=2)
        start, end = np.minimum(*edges), np.maximum(*edges)
        pattern = Whole()
    elif kind == "blocks":
        keys, size = queries, int(random.integers(1, 40))
        start = np.tile(np.arange(queries) // size * size, (rows, 1))
        end = np.minimum(start + size, keys)
        pattern = Blocks(size)
    else:
        lead = random.integers(0, 30)
        keys, span = queries + lead, random.integers(1, 60)
        last = np.arange(queries) + lead
        drawn = np.sort(random.integers(0, keys, (rows, queries)), axis=1)
        start = np.clip(drawn, np.maximum(last - span + 1, 0), last)
        end = np.tile(last + 1, (rows, 1))
        pattern = Sliding(int(span))
    hidden = random.random(start.shape) < 0.2
    if kind == "pooling":  # queries of one run share their range
        hidden = np.repeat(hidden[:, ::slots], slots, axis=1)
    return pattern, keys, start, np.where(hidden, start, end), int(shared * group), int(shared)


@pytest.mark.parametrize("name", [name for name in CASES if "window" in name or "of doc" in name])
def test_long_contexts_match_dense(name, monkeypatch):
    """With the kernel that holds dq of a row, which a window of 512 doesn't take."""
    monkeypatch.setattr(tpu, "LONG", 0)
    given, expected = case(name)
    assert_close(outcome("pallas_tpu_interpreted", *given), expected, *given[1:3])


@pytest.mark.parametrize("draws", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_random_shapes(draws, small_tiles, seed):
    random = np.random.default_rng(seed)
    for _ in range(draws):
        pattern, keys, start, end, heads, shared = random_case(random)
        print(pattern, f"keys {keys} queries {start.shape} heads {heads} over {shared}")
        given = (pattern, start, end, *tensors(start, keys, heads, shared))
        expected = outcome("dense", *given)
        for implementation in TESTED:
            assert_close(outcome(implementation, *given), expected, start, end)


@pytest.mark.parametrize("implementation", TESTED)
def test_bfloat16(implementation):
    """bfloat16 in and out, fp32 in between: as close to fp32 as the inputs' own rounding."""
    pattern, keys, start, end, heads, shared = CASES["window 50 J=2"]
    given = tensors(start, keys, heads, shared, dtype=jnp.bfloat16)
    found = outcome(implementation, pattern, start, end, *given)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    wide = (x.astype(jnp.float32) for x in given)
    assert_close(found, outcome("dense", pattern, start, end, *wide), start, end, scale=3e3)


@pytest.mark.parametrize("pattern", [Sliding(20), Pooling(2), Reading(2), Whole()], ids=str)
def test_no_races(pattern, small_tiles, capfd):
    """Two simulated cores, memory that starts as NaN, transfers that end as late as they may."""
    place = np.tile(np.arange(30), (2, 1))
    if isinstance(pattern, Sliding):
        start = np.maximum(place - 19, 0)
        end = np.where(place < 26, place + 1, start)
    elif isinstance(pattern, Whole):
        start = np.where(place < 17, 0, np.where(place < 26, 17, 26))
        end = np.where(place < 17, 17, 26)
    else:
        start = place // 2 * 2
        end = np.where(place < 26, start + 2, start)
    given = (pattern, start, end, *tensors(start, 30, 2, 1))
    expected = outcome("dense", *given)
    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(parameters):
        found = jax.block_until_ready(outcome("pallas_tpu", *given))
    assert_close(found, expected, start, end)
    assert "RACE" not in capfd.readouterr().out


def test_a_race_is_detected(capfd):
    """The control of the test above: two cores that write the same block without waiting."""

    def kernel(out_ref):
        out_ref[...] = jnp.full((8, 128), pl.program_id(0), jnp.float32)

    # Both steps of a parallel axis write block 0.
    write = pl.pallas_call(
        kernel,
        grid=(2,),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        out_specs=pl.BlockSpec((8, 128), lambda step: (0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    )
    try:
        jax.block_until_ready(write())
        raised = ""
    except jax.errors.JaxRuntimeError as error:  # of jax 0.12; before, it is printed
        raised = str(error)
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE" in raised + capfd.readouterr().out


def test_rows_are_laid_out_by_the_platform_that_is_compiled_for():
    """A CPU runs rows in turn, a TPU in parallel, whatever machine traces the program."""
    traced = jax.jit(lambda x: tiled.each_row(jnp.sin, x)).trace(jnp.zeros((4, 8)))
    loops = {
        platform: "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert loops == {"cpu": True, "tpu": False, "cuda": False}


def test_mesh():
    """Rows and heads split over 8 devices, where divisible, give the result of one device."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from bltjax.attention import Pooling, Sliding, range_attention
from bltjax.config.run import MeshConfig
from bltjax.distributed.sharding import make_mesh

random = np.random.default_rng(0)
place = np.tile(np.arange(48), (4, 1))
window = Sliding(9), 4, 2, np.maximum(place - 8, 0), place + 1
patches = Pooling(3), 3, 3, place // 3 * 3, place // 3 * 3 + 3
for sizes, way, (pattern, heads, shared, start, end) in (
    ((2, 2, 2), "pallas_tpu_interpreted", window),
    ((1, 1, 8), "pallas_tpu_interpreted", patches),
    ((1, 4, 2), "pallas_gpu_interpreted", window),
):
    q, k, v = (jnp.asarray(random.normal(size=(4, 48, count, 8)), jnp.float32)
               for count in (heads, shared, shared))

    def loss(q, k, v, start, end, way):
        out = range_attention(q, k, v, start, end, pattern=pattern, implementation=way)
        return (out ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=5)
    expected = step(q, k, v, start, end, "dense")
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("fsdp"))
        given = jax.device_put((q, k, v, start, end), rows)
        lowered = step.lower(*given, way)
        assert "manual_computation" in lowered.as_text(), sizes
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
                     lowered.compile()(*given), expected)
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


def test_unknown_implementation_raises():
    x, bound = jnp.ones((1, 4, 1, 2)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="'fast' is not one of dense, xla, pallas_tpu, pallas_gpu"):
        range_attention(x, x, x, bound, bound, pattern=Sliding(4), implementation="fast")


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.skipif(HERE in KERNELS, reason="a kernel runs here")
def test_no_kernel_falls_back(implementation):
    x, bound = jnp.ones((1, 4, 1, 2)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        range_attention(x, x, x, bound, bound, pattern=Sliding(4), implementation=implementation)


def test_config_knows_every_name():
    assert set(ATTENTION) == {"auto", *IMPLEMENTATIONS, *KERNELS}


def test_heads_must_divide():
    q, k = jnp.ones((1, 4, 3, 2)), jnp.ones((1, 4, 2, 2))
    bound = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"heads \(2\) must divide query heads \(3\)"):
        range_attention(q, k, k, bound, bound, pattern=Sliding(4))


def test_too_wide_heads():
    x, bound = jnp.ones((1, 512, 1, 4096)), jnp.zeros((1, 512), jnp.int32)
    with pytest.raises(ValueError, match=r"with 4096 channels a head need .* more than 16777216"):
        range_attention(x, x, x, bound, bound, pattern=Sliding(512), implementation="pallas_tpu")


def test_short_rows_are_dense(monkeypatch):
    """Up to 256 keys; then scores are no longer stored."""
    monkeypatch.undo()
    for keys, loops in ((256, False), (257, True)):
        start = np.maximum(np.arange(keys) - 20, 0)[None].astype(np.int32)
        end = np.arange(1, keys + 1, dtype=np.int32)[None]
        q, k, v, _ = tensors(start, keys, 2, 1)
        attend = functools.partial(range_attention, pattern=Sliding(21), implementation="xla")
        assert ("while" in str(jax.make_jaxpr(attend)(q, k, v, start, end))) == loops
        found, expected = attend(q, k, v, start, end), dense(q, k, v, start, end)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("tiles", [(4, 6), (8, 30), (5, 3)], ids=str)
def test_tiles_of_any_size(tiles, monkeypatch):
    """Ranges that jump, stand still and are empty; steps past the last key; shared heads."""
    monkeypatch.setattr(tiled, "tile_sizes", lambda *_: Tiles(*tiles))
    random = np.random.default_rng(4)
    q, k, v, g = (
        jnp.asarray(random.normal(size=(2, size, heads, 8)), jnp.float32)
        for size, heads in ((22, 4), (30, 2), (30, 2), (22, 4))
    )
    start = np.sort(random.integers(0, 31, (2, 22)), axis=1).astype(np.int32)
    end = np.maximum.accumulate(np.maximum(start, random.integers(0, 31, (2, 22))), axis=1)
    end[0, :3], start[0, :3], start[1, -4:] = 0, 0, 30
    end = np.maximum(end, start).astype(np.int32)

    def outcome(attend):
        def loss(*qkv):
            return (attend(*qkv, start, end) * g).sum()

        return attend(q, k, v, start, end), *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    expected = outcome(dense)
    found = outcome(lambda *parts: tiled.sliding(*parts, span=30))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert (np.asarray(found[0])[0, :3] == 0).all()


@pytest.mark.parametrize(
    "platform, capability, chosen",
    [
        ("tpu", None, "pallas_tpu"),
        ("gpu", "9.0", "pallas_gpu"),
        ("gpu", "10.0", "pallas_gpu"),
        ("gpu", "7.5", "xla"),
        ("gpu", "gfx942", "xla"),
        ("cpu", None, "xla"),
    ],
)
def test_choice_by_device(platform, capability, chosen):
    device = SimpleNamespace(platform=platform, device_kind=f"{platform} {capability}")
    if capability:
        device.compute_capability = capability
    assert fastest(device) == chosen
