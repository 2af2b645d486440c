"""Every rival on eight devices gives the loss and the gradients of one."""

import jax
import numpy as np
import optax
import pytest
from tiny_rivals import MODELS, get_config

from bltjax.config.run import MeshConfig, RunConfig
from bltjax.configured import model_config, parse, rows_of
from bltjax.data.batches import make_batch
from bltjax.data.pipeline import held_out_batches
from bltjax.data.records import Document
from bltjax.distributed.sharding import make_mesh, row_sharding
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
    """Rows of documents of random lengths; of tokens, which need a tokenizer, random ids."""
    random, rows = np.random.default_rng(0), rows_of(model_config(config))
    if rows.kind == "tokens":
        sizes = rows.sizes(config.data.seq_len, config.data.max_patches)
        batch = make_batch("tokens", ROWS, sizes, np.ones)
        ids = (random.integers(4, 300, batch.tokens_BN.shape) for _ in range(2))
        tokens_BN, targets_BN = (x.astype(np.int32) for x in ids)
        return batch._replace(tokens_BN=tokens_BN, targets_BN=targets_BN)
    words = random.choice(np.frombuffer(b"abcdefgh  \n", np.uint8), (3 * ROWS, 60))
    documents = [Document(text[: random.integers(20, 60)]) for text in words]
    batches, _ = held_out_batches(documents, config.data, rows)
    return batches[0]


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

    # Gradients of some biases (of keys) are zero but for rounding.
    floor = 1e-3 * max(np.abs(x).max() for x in jax.tree.leaves(one[0]))

    def close(path, a, b):
        scale = max(np.abs(a).max(), floor)
        np.testing.assert_allclose(b / scale, a / scale, atol=1e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, one, many)
