"""Decoding on up to eight devices gives the output of one, and no weight is all-gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bltjax
from bltjax.__main__ import main
from bltjax.config.model import ModelConfig, Patching
from bltjax.config.run import MeshConfig
from bltjax.configured import initial_params, make_model
from bltjax.distributed.sharding import make_mesh
from bltjax.family import Model
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.loop import run_loop
from bltjax.inference.decoding.placement import decoding_mesh, on_mesh, read_mesh
from bltjax.inference.decoding.sampling import GREEDY
from bltjax.model.blt.config import BLTConfig, CrossConfig, LatentConfig, LocalConfig
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.text.ngram_hash import HashConfig
from bltjax.weights.workdir import save_params

# Byte heads (6) that 4 does not divide, grouped latent heads, tables of 512 rows.
BYTE_LM = ByteLMConfig(layers=1, width=24, heads=6, hidden=40, window=8)
BLT_CONFIG = BLTConfig(
    LocalConfig(encoder_layers=1, decoder_layers=2, width=24, heads=6, hidden=32, window=8),
    CrossConfig(slots=2, heads=6),
    LatentConfig(layers=2, width=64, heads=8, key_value_heads=4, hidden=72),
    HashConfig(sizes=(3, 5), functions=1, rows=400),
)
PROMPTS = [b"", "A BLT 日本 has\n".encode(), b"twelve patches, or more"]


@functools.cache
def random_params(config, seed: int):
    random, model = np.random.default_rng(seed), make_model(config, 2, jnp.float32, None)
    shapes = jax.eval_shape(lambda key: initial_params(model.config, key), jax.random.key(0))
    return jax.tree.map(
        lambda x: (random.standard_normal(x.shape) * 0.25).astype(np.float32), shapes
    )


def made(**more) -> Decoder:
    return Decoder(random_model(), **more)


def random_model() -> Model:
    byte_lm = Model(ModelConfig(BYTE_LM, compute_dtype="float32"), random_params(BYTE_LM, 1))
    patching = Patching(threshold=5.1, max_patch_bytes=6)
    config = ModelConfig(BLT_CONFIG, patching, compute_dtype="float32")
    return Model(config, random_params(BLT_CONFIG, 0), byte_lm)


def written(decoder: Decoder, prompts=PROMPTS, max_bytes=40):
    rows = [[] for _ in prompts]
    for piece in decoder.generate(prompts, max_bytes=max_bytes):
        rows[piece.row].append(piece)
    return [
        (b"".join(piece.text for piece in row), np.concatenate([piece.log_probs for piece in row]))
        for row in rows
    ]


@functools.cache
def on_one():
    return written(made())


@pytest.mark.parametrize(
    "mesh, draft",
    [
        ("tensor=4", 0),
        ("data=2,tensor=2", 3),
        pytest.param("tensor=2", 0, marks=pytest.mark.slow),
        pytest.param("data=2", 0, marks=pytest.mark.slow),
        pytest.param("tensor=4", 3, marks=pytest.mark.slow),
        pytest.param("data=2,tensor=4", 0, marks=pytest.mark.slow),
        pytest.param("fsdp=2,tensor=4", 0, marks=pytest.mark.slow),
    ],
)
def test_many_devices_write_what_one_does(mesh, draft):
    decoder = made(mesh=read_mesh(mesh), draft=draft)
    for (text, log_probs), (found, found_log_probs) in zip(on_one(), written(decoder), strict=True):
        assert found == text
        np.testing.assert_allclose(found_log_probs, log_probs, atol=1e-5)
    assert decoder.counts.bytes == sum(len(text) for text, _ in on_one())
    assert decoder.counts.patches >= decoder.counts.latent_runs > 0


def test_weights_stay_where_they_lie():
    """On the devices of a training mesh with fsdp: only one position's states are sent."""
    mesh = decoding_mesh(make_mesh(MeshConfig(2, 2, 2)))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    decoder = made(mesh=mesh)
    parts = {
        "ngrams_RME": (2, 512 // 4, 24), "q_DHC": (64, 2, 8), "k_DJC": (64, 1, 8),
        "down_FD": (18, 64), "q_EGC": (24, 6, 4),
    }  # fmt: skip
    found = dict.fromkeys(parts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.params["model"]):
        if path[-1].key in parts:
            found[path[-1].key] = leaf.sharding.shard_shape(leaf.shape)
    assert found == parts

    state, asked = decoder.start([b"ab", b"c"], 8, GREEDY, 0, [])
    with on_mesh(mesh):
        compiled = run_loop.lower(
            decoder.model, GREEDY.steps, 8, decoder.params, asked, state
        ).compile()
    text = compiled.as_text()
    gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    sizes = [np.prod([int(x) for x in shape.split(",") if x] or [1]) for shape in gathers]
    assert max(sizes, default=0) <= 72, gathers  # one position's hidden states
    assert "all-to-all" not in text
    # Groups don't communicate: all sums are within one group.
    assert set(re.findall(r"all-reduce\(.*?replica_groups=(\S+?),? ", text)) <= {
        "[2,4]<=[8]", "{{0,1,2,3},{4,5,6,7}}",
    }, text.count("all-reduce(")  # fmt: skip
    # The state is donated: the result has its shardings.
    caches = jax.tree.leaves(state.memory.latent)
    after, _, _ = compiled(decoder.params, asked, state)
    assert all(cache.is_deleted() for cache in caches)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim), (old.sharding, new.sharding)


def saved(folder):
    """A run's work directory with the parameters of `made`."""
    model = random_model()
    save_params(folder, model, 1)
    save_params(folder / "byte_lm", model.entropy_model, 1)
    return folder


def test_a_run_is_loaded_onto_a_mesh(tmp_path):
    model = bltjax.load(saved(tmp_path / "run"), mesh="tensor=4")
    tables_RME = model.params["encoder"]["ngrams_RME"]
    assert tables_RME.sharding.shard_shape(tables_RME.shape) == (2, 128, 24)
    text = "".join(model.generate(PROMPTS[1], max_bytes=40))
    assert text == on_one()[1][0].decode(errors="replace")
    source = tmp_path / "text.txt"
    source.write_text("A BLT has no tokenizer.", encoding="utf-8")
    expected = bltjax.evaluate(bltjax.load(tmp_path / "run"), source)
    assert bltjax.evaluate(model, source) == expected  # on one of the devices


@pytest.mark.slow
def test_bfloat16_on_request(tmp_path, capsys):
    run_folder = saved(tmp_path / "run")
    model = bltjax.load(run_folder, mesh="data=2,tensor=2", dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        # Norms are few, and keep their dtype.
        assert leaf.dtype.name == ("float32" if "norm" in path[-1].key else "bfloat16")
    assert next(model.generate(PROMPTS[1], max_bytes=4))
    decoder = model.decoder
    memory = decoder.memory([np.array([1, 70], np.int32)] * 2)
    assert {x.dtype.name for x in jax.tree.leaves((memory.latent, memory.encoder))} == {"bfloat16"}
    # The byte LM that places patches is exact, whatever the dtype of the rest.
    kept = (decoder.params["scorer"], memory.scorer)
    assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"float32"}
    words = ["--mesh=data=2,tensor=2", "--dtype=bfloat16", "--prompt=A BLT", "--max_bytes=4"]
    assert main(["generate", f"--workdir={run_folder}", *words]) == 0
    assert capsys.readouterr().out.startswith("A BLT")


def test_a_byte_lm_is_split_as_well():
    model = random_model().entropy_model
    alone, split = (
        written(Decoder(model, mesh=mesh), max_bytes=12)
        for mesh in (None, read_mesh("data=2,tensor=2"))
    )
    for (text, log_probs), (found, found_log_probs) in zip(alone, split, strict=True):
        assert found == text
        np.testing.assert_allclose(found_log_probs, log_probs, atol=1e-5)


def test_bad_meshes():
    for text, why in (("4", "AXIS=DEVICES"), ("tensor=0", ">= 1"), ("data=3,tensor=4", "= 12")):
        with pytest.raises(ValueError, match=why):
            read_mesh(text)
    with pytest.raises(ValueError, match="decoding_mesh"):
        made(mesh=make_mesh(MeshConfig(1, 2, 4)))
