"""Work directories: complete, or a clear message about the missing part."""

import shutil

import jax
import numpy as np
import pytest

from bltjax.config.run import RunConfig
from bltjax.configured import initial_params, model_config
from bltjax.family import Model
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.training.checkpoint import make_manager, save
from bltjax.training.resume import check_workdir
from bltjax.training.step import TrainState
from bltjax.weights.export import load_params
from bltjax.weights.workdir import identity, save_params, saved_steps, stored_shapes

CONFIG = RunConfig(ByteLMConfig(layers=1, width=8, heads=1, hidden=8, window=4))


def test_parameters_round_trip_with_their_identity(tmp_path):
    params = jax.tree.map(np.array, initial_params(CONFIG.model, jax.random.key(0)))
    saved = Model(model_config(CONFIG), params)
    save_params(tmp_path / "run", saved, 3)
    config, restored, _, step = load_params(tmp_path / "run")
    assert (config, step) == (saved.config, 3) and identity(restored) == identity(params)
    assert isinstance(restored["block_0"]["q_EGC"], jax.Array)
    params["block_0"]["q_EGC"][0, 0, 0] = 1e-3
    assert identity(restored) != identity(params)


def test_a_checkpoint_being_written_is_not_one(tmp_path):
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    assert saved_steps(tmp_path) == []
    check_workdir(tmp_path, CONFIG)  # nothing was saved, so the folder may be reused
    with pytest.raises(ValueError, match="is neither a training run nor an export"):
        load_params(tmp_path)


def test_damaged_checkpoints_are_named(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs.byte_lm, copy)
    shutil.rmtree(copy / "checkpoints" / "12" / "params")
    with pytest.raises(
        ValueError, match=r"checkpoints/12/params can't be read: .*\n.*one before it"
    ):
        load_params(copy)
    shutil.rmtree(copy / "checkpoints" / "12")
    assert load_params(copy).step == 8
    (copy / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_params(copy)
    shutil.rmtree(copy / "checkpoints")
    shutil.copy(runs.byte_lm / "config.json", copy)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_params(copy)


def test_parameters_lie_in_chunks(tmp_path, monkeypatch):
    """So that a converter can read a table of many gigabytes in blocks, whatever a device held."""
    monkeypatch.setattr("bltjax.weights.workdir.CHUNK_BYTES", 1 << 16)
    manager = make_manager(tmp_path, CONFIG)
    params = {"ngrams_RME": jax.numpy.ones((3, 512, 64))}
    save(
        manager,
        TrainState(jax.numpy.zeros((), int), params, {"a_E": jax.numpy.ones(2)}),
        {},
        {"step": 1},
    )
    manager.close()
    stored = stored_shapes(tmp_path / "checkpoints" / "1" / "params")
    assert np.prod(stored["ngrams_RME"].storage.chunk_shape) * 4 <= 1 << 16
