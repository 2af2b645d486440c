"""Every rival on eight devices gives the loss and the gradients of one."""

import jax
import numpy as np
import optax
import pytest
from tiny_rivals import MODELS, get_config

from bltjax.config.run import MeshConfig, RunConfig
from bltjax.data.batches import make_batch, target_bytes_of
from bltjax.distributed.sharding import make_mesh, row_sharding
from bltjax.families import model_config, parse, rows_of
from bltjax.training.step import step_parts

MESHES = [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)]
ROWS = 8


def run_config(name: str, mesh: tuple[int, int, int]) -> RunConfig:
    values = get_config(name).to_dict()
    values["data"]["batch_size"] = ROWS
    values["mesh"] = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    values["optimizer"] |= {"warmup_steps": 0, "clip": 1e9}
    return parse(RunConfig, values)


def batch_of(config: RunConfig):
    """Two documents and padding in each row, of random ids."""
    random, rows = np.random.default_rng(0), rows_of(model_config(config))
    sizes = rows.sizes(config.data.seq_len, config.data.max_patches)
    batch = make_batch(rows.kind, ROWS, sizes, np.zeros)
    length = sizes["N"]
    ids_BN = random.integers(4, 260, (ROWS, length)).astype(np.int32)
    documents_BN = np.ones((ROWS, length), np.int32)
    documents_BN[:, length // 2 + 1 :] = 2
    documents_BN[:, length - 7 :] = 0
    real_BN = documents_BN > 0
    targets_BN = random.integers(4, 260, (ROWS, length)).astype(np.int32)
    values = {
        batch._fields[0]: ids_BN * real_BN,
        "documents_BN": documents_BN,
        "targets_BN": targets_BN,
        "weights_BN": real_BN.astype(np.float32),
        "target_bytes_BN": target_bytes_of(targets_BN, real_BN),
    }
    if rows.kind == "patches":
        starts_BN1 = np.pad(real_BN, ((0, 0), (0, 1))) & (random.random((ROWS, length + 1)) < 0.3)
        starts_BN1[:, :2] = starts_BN1[:, length // 2 + 1 : length // 2 + 3] = True
        values["starts_BN1"] = starts_BN1
    return batch._replace(**values)


def stepped(config: RunConfig, devices):
    """Adam's first moments (a tenth of the gradients) and the sums of one step."""
    parts = step_parts(config, make_mesh(config.mesh, devices))
    one = step_parts(
        run_config(config.model.group, (1, 1, 1)), make_mesh(MeshConfig(1, 1, 1), devices[:1])
    )
    state = jax.device_get(jax.jit(one.initial_state)(jax.random.key(0)))
    state = jax.device_put(state, parts.shardings)
    batch = jax.device_put(batch_of(config), row_sharding(make_mesh(config.mesh, devices)))
    state, report = parts.step(state, batch)
    return jax.device_get((optax.tree.get(state.opt, "mu"), report["sums"]))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_equal_one(name, mesh):
    one = stepped(run_config(name, (1, 1, 1)), jax.devices()[:1])
    many = stepped(run_config(name, mesh), jax.devices())

    def close(path, a, b):
        scale = max(np.abs(a).max(), 1e-9)
        np.testing.assert_allclose(b / scale, a / scale, atol=1e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, one, many)
