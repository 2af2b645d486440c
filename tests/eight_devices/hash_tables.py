"""Hash tables over eight devices: the look-up and the gradient of one, however ids are skewed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bltjax.config.run import MeshConfig
from bltjax.distributed.sharding import make_mesh, tree_shardings
from bltjax.model.blt.hash_tables import capacity_of, looked_up

R, M, E, B, N = 2, 4096, 8, 8, 48
SHAPES = [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]
OWNED = M // 8


def skewed(name: str, random) -> np.ndarray:
    """Ids [R, B, N]; the fewer owners have them, the harder the case."""
    shape = (R, B, N)
    if name == "every id equal":
        return np.full(shape, 3 * OWNED + 1, np.int32)
    if name == "all distinct, one owner":
        ids = np.tile(np.arange(OWNED), R * B * N)[: R * B * N].reshape(shape)
        return (5 * OWNED + ids).astype(np.int32)
    if name == "one row of one owner":
        ids = random.integers(0, M, shape)
        ids[:, 0] = 7 * OWNED + np.arange(N)
        return ids.astype(np.int32)
    return random.integers(0, M, shape).astype(np.int32)


def programs(mesh):
    """Look-up and gradient of a mix of its sums; compiled once for all skews."""

    def outcome(tables_RME, ids_RBN, mix_BNE):
        def mixed(tables_RME):
            sums_BNE = looked_up(tables_RME, ids_RBN, jnp.dtype("float32"))
            return (sums_BNE * mix_BNE).sum(), sums_BNE

        (_, sums), grads = jax.value_and_grad(mixed, has_aux=True)(tables_RME)
        return sums, grads

    if mesh is None:
        return jax.jit(outcome)
    tables = tree_shardings({"ngrams_RME": jax.ShapeDtypeStruct((R, M, E), "float32")}, mesh)
    rows = ("data", "fsdp")
    shardings = (
        tables["ngrams_RME"],
        NamedSharding(mesh, PartitionSpec(None, rows)),
        NamedSharding(mesh, PartitionSpec(rows)),
    )
    return jax.jit(outcome, in_shardings=shardings, out_shardings=(shardings[2], shardings[0]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_devices_equal_one(shape):
    seed = np.random.SeedSequence().entropy % 2**32
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    mesh = make_mesh(MeshConfig(*shape))
    one = programs(None)
    arrays = [jax.ShapeDtypeStruct(s, "float32") for s in ((R, M, E), (B, N, E))]
    ids = jax.ShapeDtypeStruct((R, B, N), "int32")
    with jax.set_mesh(mesh):
        many = programs(mesh).lower(arrays[0], ids, arrays[1]).compile()
    for name in ("every id equal", "all distinct, one owner", "one row of one owner", "random"):
        tables = random.normal(size=(R, M, E)).astype(np.float32)
        mix = random.normal(size=(B, N, E)).astype(np.float32)
        given = (tables, skewed(name, random), mix)
        found = many(*jax.device_put(given, many.input_shardings[0]))
        for a, b in zip(one(*given), found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5, err_msg=name)
    check_parts(many.as_text(), shape)


def check_parts(text: str, shape):
    """No array is larger than one device's share of all tables, forward or backward."""
    sizes = re.findall(r"f32\[([\d,]+)\]", text)
    largest = max(np.prod([int(size) for size in found.split(",")]) for found in sizes)
    assert largest == R * M * E / (shape[1] * shape[2])


def test_capacity():
    """Distinct ids: one round serves the mean plus six deviations, and never more than there
    are."""
    assert capacity_of(16384, 16) == 1216 and capacity_of(16384, 256) == 112
    assert capacity_of(5, 8) == 5
