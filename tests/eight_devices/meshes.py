"""Every mesh of up to eight devices gives the loss and the gradients of one, and none reshards.

The mesh accumulates two micro-batches; one device takes the batch whole.
"""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from random_batch import random_batch

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.run import MeshConfig, OptimizerConfig, RunConfig
from bltjax.configured import initial_params, model_config
from bltjax.distributed.sharding import make_mesh, row_sharding
from bltjax.evaluation.evaluate import evaluate
from bltjax.evaluation.scores import evaluation_mesh
from bltjax.family import Model
from bltjax.model.blt.config import BLTConfig, CrossConfig, LatentConfig, LocalConfig
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.text.ngram_hash import HashConfig
from bltjax.training.step import step_parts
from bltjax.weights.workdir import save_params

POWERS = [
    (data, fsdp, tensor)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if 1 < data * fsdp * tensor <= 8
]
# Table rows are a multiple of 512, so fsdp and tensor are powers of two; data can be any.
OTHERS = [(3, 1, 1), (3, 2, 1), (3, 1, 2), (6, 1, 1), (5, 1, 1), (7, 1, 1)]
QUICK = [(1, 2, 4), (2, 2, 2)]


def run_config(rows: int, **settings) -> RunConfig:
    """Grouped key/value heads, two slots per patch, tables; byte heads that 8 doesn't divide."""
    return RunConfig(
        BLTConfig(
            LocalConfig(encoder_layers=1, decoder_layers=1, width=32, heads=4, hidden=48, window=9),
            CrossConfig(slots=2, heads=4),
            LatentConfig(layers=2, width=64, heads=16, key_value_heads=8, hidden=96),
            HashConfig(sizes=(3, 5), functions=1, rows=4000),
        ),
        data=DataConfig(batch_size=rows, seq_len=32, max_patches=16),
        compute_dtype="float32",
        **settings,
    )


@functools.cache
def initial_state():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    parts = step_parts(run_config(1), mesh)
    return jax.device_get(jax.jit(parts.initial_state)(jax.random.key(0)))


def stepped(config, devices):
    """Adam's first moments (a tenth of the gradients) and the report of one step; its programs."""
    mesh = make_mesh(config.mesh, devices)
    parts = step_parts(config, mesh)
    state = jax.device_put(initial_state(), parts.shardings)
    batch = jax.device_put(random_batch(config.data, np.random.default_rng(0)), row_sharding(mesh))
    lowered = parts.step.lower(state, batch)
    compiled = lowered.compile()
    moments = jax.tree.leaves(state.opt)
    state, report = compiled(state, batch)
    assert all(leaf.is_deleted() for leaf in moments if leaf.ndim), "the state is given up"
    compared = {name: report[name] for name in ("sums", "gradient_norm", "gradient_norms")}
    return jax.device_get((optax.tree.get(state.opt, "mu"), compared)), lowered, compiled


@functools.cache
def on_one(rows: int):
    optimizer = OptimizerConfig(warmup_steps=0, clip=1e9)
    return stepped(
        run_config(rows, optimizer=optimizer, mesh=MeshConfig(1, 1, 1)), jax.devices()[:1]
    )[0]


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in POWERS + OTHERS],
    ids=str,
)
def test_any_mesh_equals_one_device(shape):
    data, fsdp, _ = shape
    rows = 2 * data * fsdp if shape in OTHERS else 16
    optimizer = OptimizerConfig(warmup_steps=0, clip=1e9, grad_accum_steps=2)
    config = run_config(rows, optimizer=optimizer, mesh=MeshConfig(*shape))
    found, lowered, compiled = stepped(config, jax.devices()[: math.prod(shape)])

    def close(path, a, b):
        scale = np.abs(a).max()
        np.testing.assert_allclose(b / scale, a / scale, atol=1e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, on_one(rows), found)
    check_shardings(shape, lowered.as_text(), compiled.as_text())


def test_evaluation_takes_any_number_of_devices(tmp_path, caplog):
    """Devices that don't divide the parameters share the rows; the result is unchanged."""
    config = RunConfig(
        ByteLMConfig(layers=1, width=32, heads=4, hidden=48, window=8),
        data=DataConfig(batch_size=2, seq_len=32, max_patches=32),
        compute_dtype="float32",
    )
    params = initial_params(config.model, jax.random.key(0))
    save_params(tmp_path / "run", Model(model_config(config), params), 1)
    (tmp_path / "text.txt").write_text("a text of a few lines\n\n" * 9)
    source = SourceConfig(str(tmp_path / "text.txt"), split_bytes=20)
    caplog.set_level("INFO", "bltjax")
    found = []
    for count, shape in ((1, (1, 1, 1)), (3, (3, 1, 1)), (6, (3, 2, 1)), (8, (1, 8, 1))):
        caplog.clear()
        mesh = evaluation_mesh(config, devices=jax.devices()[:count])
        assert tuple(mesh.shape.values()) == shape
        assert ("must divide" in caplog.text) == (shape[0] > 1)
        if count in (1, 3):
            result = evaluate(tmp_path / "run", source, mesh=mesh)
            found.append((result["bits_per_byte"], result["text_bytes"]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    three = jax.devices()[:3]
    for asked, why in (
        (MeshConfig(1, 2, 1), "= 2, but there are 3 devices; --mesh=data=3 works here"),
        (MeshConfig(1, 3, 1), "--mesh=fsdp=3: mesh fsdp .3. must divide .*; --mesh=data=3 works"),
        (MeshConfig(1, -1, 2), "must divide the number of devices .3.*; --mesh=data=3 works"),
    ):
        with pytest.raises(ValueError, match=why) as raised:
            evaluation_mesh(config, asked, three)
        assert "--config" not in str(raised.value)
    assert evaluation_mesh(config, MeshConfig(3, 1, 1), three).shape["data"] == 3


def check_shardings(shape, lowered: str, compiled: str):
    _, fsdp, tensor = shape
    # Every product of a layer holds its output, and every weight is all-gathered.
    assert fsdp * tensor == 1 or lowered.count("sdy.sharding_constraint") > 100
    # No resharding: all-to-alls carry only ids, rows and gradients of tables.
    exchanges = re.findall(r'all-to-all.*op_name="[^"]*/([^/"]+)"', compiled)
    assert set(exchanges) <= {"all_to_all"}
    # No device holds a whole table, the latent layers together, or a gradient of either.
    if fsdp * tensor > 1:
        assert "f32[2,4096,32]" not in compiled and "f32[8192,32]" not in compiled
    if fsdp > 1:
        assert f"f32[2,64,{16 // tensor},4]" not in compiled
        assert f"f32[2,64,{96 // tensor}]" not in compiled
