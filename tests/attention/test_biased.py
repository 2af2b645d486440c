"""Attention with a relative bias: tiles against the definition, values and all gradients."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bltjax.attention.biased as biased
from bltjax.attention import range_attention
from bltjax.attention.biased import biased_attention, cached_biased_attention
from bltjax.attention.distances import distance_buckets
from bltjax.attention.kv_cache import Cache
from bltjax.attention.pattern import Sliding
from bltjax.attention.staircase import Tiles

N = 60
# Lengths of documents in each row; the rest is padding.
DOCUMENTS = ((60,), (1, 30, 20), (25, 25), ())


def ranges(kind: str):
    """Ranges of self-attention, causal or whole, or of queries that read other rows' documents."""
    starts, ends = [], []
    for sizes in DOCUMENTS:
        edges = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        start, end = np.full(N, edges[-1]), np.full(N, edges[-1])
        for a, b in itertools.pairwise(edges):
            start[a:b] = a
            end[a:b] = np.arange(a, b) + 1 if kind == "causal" else b
        starts.append(start)
        ends.append(end)
    start, end = np.array(starts, np.int32), np.array(ends, np.int32)
    if kind == "cross":  # other positions see these, some twice and some never
        picked = np.sort(np.random.default_rng(5).integers(0, N, 43))
        start, end = start[:, picked], end[:, picked]
    return start, end


def outcome(kind: str, implementation: str, farthest: int | None, dtype=jnp.float32):
    """Output and gradients, of the bias too."""
    start, end = ranges(kind)
    random = np.random.default_rng(1)
    shapes = [(len(start), size, 2, 8) for size in (start.shape[1], N, N, start.shape[1])]
    q, k, v, weight = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    bias = None
    if farthest is not None:
        bias = jnp.asarray(random.normal(size=(2, 2 * farthest + 1)), jnp.float32)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(*inputs):
        def loss(q, k, v, bias):
            out = biased_attention(q, k, v, start, end, bias, implementation=implementation)
            return (out * weight).sum(dtype=jnp.float32), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*inputs)
        return (out, *grads)

    return [x for x in run(q, k, v, bias) if x is not None], start, end


CASES = [("whole", 7), ("causal", 7), ("whole", 90), ("causal", None), ("cross", None)]


@pytest.mark.parametrize("tiles", [None, (8, 16), (7, 13), (1, 60)], ids=str)
@pytest.mark.parametrize(("kind", "farthest"), CASES)
def test_matches_the_definition(kind, farthest, tiles, monkeypatch):
    """All at once, and by tiles of any size; with the last tile moved back."""
    if tiles:
        monkeypatch.setattr(biased, "SHORT", 0)
        monkeypatch.setattr(biased, "tile_sizes", lambda *_: Tiles(*tiles))
    found, start, end = outcome(kind, "xla", farthest)
    expected, _, _ = outcome(kind, "dense", farthest)
    assert len(found) == len(expected) == (4 if farthest is None else 5)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=1e-5)
    assert not np.asarray(found[0])[start == end].any(), "an empty range must give zeros"


def test_bfloat16(monkeypatch):
    """The bias and its gradient stay in fp32."""
    monkeypatch.setattr(biased, "SHORT", 0)
    monkeypatch.setattr(biased, "tile_sizes", lambda *_: Tiles(8, 16))
    found, _, _ = outcome("whole", "xla", 7, jnp.bfloat16)
    expected, _, _ = outcome("whole", "dense", 7)
    assert [x.dtype for x in found] == [jnp.bfloat16] * 4 + [jnp.float32]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.15, rtol=0.1)


def test_the_definition_by_hand():
    """One query's softmax written out; without a bias it is range attention of q sqrt(C)."""
    random = np.random.default_rng(2)
    q, k, v = (random.normal(size=(1, 5, 1, 4)).astype(np.float32) for _ in range(3))
    bias = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]], np.float32)  # distances -2 ... 2
    bounds = np.array([[0, 0, 0, 1, 1]]), np.array([[5, 5, 5, 5, 4]])
    out = biased_attention(q, k, v, *bounds, bias, implementation="dense")
    scores = k[0, 1:5, 0] @ q[0, 3, 0] + np.array([1.0, 2.0, 3.0, 4.0])  # of query 3
    probs = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(out[0, 3, 0], probs @ v[0, 1:5, 0], rtol=1e-5)
    plain = biased_attention(q, k, v, *bounds, implementation="dense")
    scaled = range_attention(q * 2, k, v, *bounds, pattern=Sliding(9), implementation="dense")
    np.testing.assert_allclose(plain, scaled, rtol=1e-5)


def test_no_array_of_heads_by_queries_by_keys():
    """Of a long row, forward and backward: the largest array is linear in it."""
    size, heads = 4096, 2
    x = jax.ShapeDtypeStruct((1, size, heads, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((heads, 257), jnp.float32)

    def loss(q, k, v, bias):
        start, end = jnp.zeros((1, size), jnp.int32), jnp.full((1, size), size, jnp.int32)
        return biased_attention(q, k, v, start, end, bias, implementation="xla").sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, bias).as_text()
    shapes = {tuple(map(int, s.split("x")[:-1])) for s in tensor_shapes(text)}
    assert max(int(np.prod(shape)) for shape in shapes) < size * size / 8


def tensor_shapes(text: str) -> set[str]:
    """The shapes that a lowered program has, `4x8xf32`."""
    pieces = (piece.partition(">")[0] for piece in text.split("tensor<")[1:])
    return {piece for piece in pieces if "x" in piece and piece[0].isdigit()}


def test_buckets():
    """Published sizes: single distances first, then fewer and fewer; ends share the last."""
    both = distance_buckets(32, 128, both_sides=True)
    zero = 128
    assert both[zero] == 0 and both[zero - 7] == 7 and both[zero + 7] == 23
    assert both[zero - 8] == both[zero - 11] == 8 and both[zero - 12] == 9
    assert both[0] == both[zero - 91] == 15 and both[-1] == 31
    causal = distance_buckets(32, 128, both_sides=False)
    assert not causal[zero:].any()
    assert causal[zero - 15] == 15 and causal[zero - 16] == 16
    assert causal[0] == causal[zero - 113] == 31 and causal[zero - 112] == 30


@pytest.mark.slow
def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    for buckets, farthest in ((32, 128), (8, 12), (16, 100), (64, 500), (32, 17)):
        distance = torch.arange(-farthest - 5, farthest + 6)
        for both_sides in (True, False):
            theirs = t5.T5Attention._relative_position_bucket(
                distance, both_sides, buckets, farthest
            )
            ours = distance_buckets(buckets, farthest, both_sides=both_sides)
            ours = np.pad(ours, 5, mode="edge")
            np.testing.assert_array_equal(ours, theirs.numpy())


def test_cached_equals_full():
    """The last position by a cache with unused slots, and by the whole row."""
    random = np.random.default_rng(3)
    q, k, v = (jnp.asarray(random.normal(size=(2, 9, 2, 4)), jnp.float32) for _ in range(3))
    bias = jnp.asarray(random.normal(size=(2, 7)), jnp.float32)
    end = jnp.tile(jnp.arange(1, 10, dtype=jnp.int32)[None], (2, 1))
    full = biased_attention(q, k, v, jnp.zeros_like(end), end, bias, implementation="dense")
    pad = ((0, 0), (0, 4), (0, 0), (0, 0))
    held = [jnp.pad(x[:, :8], pad, constant_values=9.0).swapaxes(1, 2) for x in (k, v)]
    mask = jnp.array([True] * 8 + [False] * 4 + [True])
    away = jnp.clip(jnp.array([*range(-8, 4), 0]), -3, 3) + 3
    out = cached_biased_attention(
        q[:, 8:],
        Cache(*held),
        jnp.broadcast_to(mask[None, None], (2, 1, 13)),
        jnp.broadcast_to(bias[:, away][None, :, None], (2, 2, 1, 13)),
        (k[:, 8:], v[:, 8:]),
    )
    np.testing.assert_allclose(out[:, 0], full[:, 8], atol=1e-6)


def test_mesh():
    """Rows and heads split over 8 devices give the result of one; so does the bias's gradient."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import bltjax.attention.biased as biased
from bltjax.attention.staircase import Tiles
from bltjax.config.run import MeshConfig
from bltjax.distributed.sharding import make_mesh

biased.SHORT, biased.tile_sizes = 0, lambda *_: Tiles(8, 16)
random = np.random.default_rng(0)
q, k, v = (jnp.asarray(random.normal(size=(4, 48, 4, 8)), jnp.float32) for _ in range(3))
bias = jnp.asarray(random.normal(size=(4, 9)), jnp.float32)
start = jnp.zeros((4, 48), jnp.int32)

def loss(q, k, v, bias, way):
    out = biased.biased_attention(q, k, v, start, start + 48, bias, implementation=way)
    return (out ** 2).mean()

step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
expected = step(q, k, v, bias, "dense")
for sizes in ((2, 2, 2), (1, 1, 8)):
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))) as _:
        lowered = step.lower(q, k, v, bias, "xla")
        assert "manual_computation" in lowered.as_text(), sizes
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                     lowered.compile()(q, k, v, bias), expected)
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


def test_refused():
    x, bound = jnp.ones((1, 4, 1, 2)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="dense or xla, not 'pallas_tpu': the kernels have scale"):
        biased_attention(x, x, x, bound, bound, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"dense or xla, not 'fast'$"):
        biased_attention(x, x, x, bound, bound, implementation="fast")
    with pytest.raises(ValueError, match=r"queries \(4\) as keys \(3\)"):
        biased_attention(
            x, x[:, :3], x[:, :3], bound, bound, jnp.ones((1, 5)), implementation="dense"
        )
