"""A Llama's layers as a latent transformer: the same hidden states, and training from them."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import port
import pytest
from etils import epath

from bltjax.config.run import LatentInitConfig, OptimizerConfig
from bltjax.model.blt.config import BLTConfig, CrossConfig, LocalConfig
from bltjax.model.blt.latent_transformer import LatentTransformer
from bltjax.text.segments import Ranges
from bltjax.training.optimizer import make_optimizer
from bltjax.weights.lazy import Tensor, blocks, tree_of
from bltjax.weights.released.leftovers import latent_rotary
from bltjax.weights.released.llama import latent_config, llama_leaves

LATENT = latent_config(port.LLAMA_CONFIG, "case", remat="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    port.write_tensors(path, port.tensors_by_rule(port.llama_shapes(LATENT)))
    (path / "config.json").write_text(json.dumps(port.LLAMA_CONFIG))
    return epath.Path(path)


def test_hidden_states(folder):
    """Grouped-query heads, Llama 3.1's scaling, positions beyond the original ones."""
    recorded = np.load(port.RECORDED)["llama/hidden"]
    x_BPD = port.llama_inputs()
    config = BLTConfig(
        local=LocalConfig(width=24, heads=2), cross=CrossConfig(heads=2), latent=LATENT
    )
    index_BP = jnp.arange(x_BPD.shape[1], dtype=jnp.int32)[None]
    ranges = Ranges(jnp.zeros_like(index_BP), index_BP + 1, index_BP)
    params = tree_of(llama_leaves(folder, LATENT))["latent"]
    model = LatentTransformer(config, jnp.float32, None, x_BPD.shape[1])
    slots_BSE = jnp.asarray(x_BPD.reshape(1, -1, 24))
    ours_BPD, _ = jax.jit(model.apply)({"params": params}, slots_BSE, ranges)
    ours = ours_BPD[0]
    np.testing.assert_allclose(ours, recorded, atol=2e-5, rtol=0)
    if torch_is_there():
        tensors = port.tensors_by_rule(port.llama_shapes(LATENT))
        np.testing.assert_allclose(port.record_llama(tensors), recorded, atol=1e-5, rtol=0)


def torch_is_there() -> bool:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def test_old_spelling_of_the_rotary_settings():
    old = {k: v for k, v in port.LLAMA_CONFIG.items() if k != "rope_parameters"}
    scaling = {k: v for k, v in port.LLAMA3.items() if k != "rope_theta"}
    old |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert latent_config(old, "old", "none") == LATENT
    with pytest.raises(ValueError, match="rope_type is 'yarn'; supported"):
        latent_config(old | {"rope_scaling": {"type": "yarn"}}, "old", "none")


def test_another_shape_is_refused(folder):
    import dataclasses

    with pytest.raises(ValueError, match=r"latent.hidden is 96, but the Llama in .* has 80"):
        llama_leaves(folder, dataclasses.replace(LATENT, hidden=96))
    with pytest.raises(ValueError, match=r"latent.rope_scaling is None, but the Llama"):
        llama_leaves(folder, dataclasses.replace(LATENT, rope_scaling=None))
    with pytest.raises(ValueError, match=r"model_type is None; supported: 'llama'"):
        latent_config({}, "x", "none")
    with pytest.raises(ValueError, match=r"x: partial_rotary_factor is 0.5; supported: 1.0, None"):
        latent_config(port.LLAMA_CONFIG | {"partial_rotary_factor": 0.5}, "x", "none")


def test_a_tensor_that_has_no_place(folder, tmp_path):
    tensors = port.tensors_by_rule(port.llama_shapes(LATENT))
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]
    port.write_tensors(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(port.LLAMA_CONFIG))
    with pytest.raises(ValueError, match=r"has tensor model.layers.9.mlp.up_proj.weight"):
        llama_leaves(epath.Path(tmp_path), LATENT)


def test_what_other_libraries_leave(folder, tmp_path, caplog):
    """Torch's prefixes, rotary rates, the Hub's cache: the same leaves, and lines in the log."""
    cache = tmp_path / "models--meta--llama"
    snapshot = cache / "snapshots" / "abc"
    tensors = port.tensors_by_rule(port.llama_shapes(LATENT))
    rates = latent_rotary(LATENT).rates.astype(np.float32)
    for name in ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        tensors[name] = Tensor(rates.shape, rates.dtype, lambda a, b: rates[a:b], "")
    port.write_tensors(snapshot, {f"module.{name}": tensor for name, tensor in tensors.items()})
    (snapshot / "config.json").write_text(json.dumps(port.LLAMA_CONFIG))
    logger = logging.getLogger("bltjax")
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "propagate", True)
        patch.setattr(logger, "level", logging.INFO)
        found = [llama_leaves(epath.Path(cache), LATENT) for _ in range(2)]
    assert len(caplog.messages) == 3 and "and 1 more left out: the rotary" in caplog.messages[2]
    plain = llama_leaves(folder, LATENT)
    for path, leaf in plain.items():
        for place, rows in blocks(path, leaf):
            assert (leaf.read(place, rows) == found[0][path].read(place, rows)).all()
    rates[1] *= 1.01
    port.write_tensors(snapshot, tensors)
    with pytest.raises(ValueError, match=r"inv_freq is [\d.e-]+ at 1; .*\(theta 500000\) it is"):
        llama_leaves(epath.Path(cache), LATENT)


def test_learning_rates():
    """The blocks are frozen, then train at their share; the rest of the model is unaffected."""
    params = {"latent": {"blocks": {"up_LDF": jnp.ones(3)}, "widen_KED": jnp.ones(3)}}
    grads = jax.tree.map(jnp.ones_like, params)
    settings = OptimizerConfig(steps=10, lr=1e-2, warmup_steps=0, weight_decay=0.0)
    init = LatentInitConfig(path="x", lr_multiplier=0.5, frozen_steps=2)
    optimizer, plain = make_optimizer(settings, init), make_optimizer(settings)
    state, plain_state = optimizer.init(params), plain.init(params)
    for step in range(4):
        updates, state = optimizer.update(grads, state, params)
        expected, plain_state = plain.update(grads, plain_state, params)
        share = 0.0 if step < 2 else 0.5
        found = updates["latent"]["blocks"]["up_LDF"] / expected["latent"]["blocks"]["up_LDF"]
        np.testing.assert_allclose(found, share, rtol=1e-6)
        same = updates["latent"]["widen_KED"] == expected["latent"]["widen_KED"]
        assert same.all()


@pytest.mark.slow
def test_training_begins_as_a_llama(runs, folder, tmp_path):
    from bltjax.weights.export import load_params

    latent = (
        "layers=3", "width=48", "heads=6", "key_value_heads=2", "hidden=80",
        "rope_theta=5e5", "rope_scaling={'factor': 8.0, 'positions': 32}",
    )  # fmt: skip
    settings = [f"--config.blt.latent.{setting}" for setting in latent]
    settings += ["--config.optimizer.steps=2", "--config.latent_init.frozen_steps=2"]
    runs.train("blt", tmp_path / "run", *runs.blt_settings, *settings, f"latent_init.path={folder}")
    params = load_params(tmp_path / "run").params
    initial = tree_of(llama_leaves(folder, LATENT))["latent"]["blocks"]
    for name, leaf in initial.items():  # frozen: as they came, bit for bit
        assert (params["latent"]["blocks"][name] == leaf).all(), name
