"""Invariants of the whole model: no leak, packed equals alone, rows apart, scan equals loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.attention.pattern import Sliding
from bltjax.config.model import Patching
from bltjax.configured import initial_params, load_config, make_model
from bltjax.model.blt.config import BLTConfig, CrossConfig, LatentConfig, LocalConfig
from bltjax.model.blt.latent_transformer import block_size
from bltjax.model.blt.model import BLT
from bltjax.model.byte_lm import ByteLM, ByteLMConfig
from bltjax.model.layers import Block
from bltjax.model.params import parameter_count
from bltjax.text.alphabet import encode
from bltjax.text.ngram_hash import HashConfig
from bltjax.text.patching import force_starts, patch_starts
from bltjax.text.segments import row_patches

CONFIG = BLTConfig(
    LocalConfig(encoder_layers=2, decoder_layers=2, width=32, heads=4, hidden=48, window=9),
    CrossConfig(slots=2, heads=2, encoder="all", decoder="all"),
    LatentConfig(layers=2, width=48, heads=4, key_value_heads=2, hidden=64, remat="none"),
    HashConfig(sizes=(3, 5), functions=2, rows=101),
)
N, P = 64, 40
SPACE = Patching(mode="space")
TEXTS = ("A BLT has no tokens.", "Patches scale better", "than tokens do")


@functools.cache
def params():
    model = BLT(CONFIG, P)
    return jax.jit(lambda key: initial_params(model.config, key))(jax.random.key(0))


@functools.cache
def program():
    return jax.jit(BLT(CONFIG, P).apply)


def row(texts, length=N):
    """One row of whole documents: ids, documents, starts."""
    ids, documents, starts = [], [], []
    for number, text in enumerate(texts, start=1):
        x = encode(text)
        ids.append(x)
        documents.append(np.full(len(x), number))
        starts.append(force_starts(patch_starts(SPACE, x))[:-1])
    used = sum(map(len, ids))
    pad = lambda parts, n, dtype: np.pad(np.concatenate(parts), (0, n - used)).astype(dtype)  # noqa: E731
    starts_N1 = pad(starts, length + 1, bool)
    starts_N1[used] = True
    return pad(ids, length, np.int32), pad(documents, length, np.int32), starts_N1


def logits_of(*rows):
    batch = [jnp.asarray(np.stack(part)) for part in zip(*rows, strict=True)]
    return np.asarray(program()({"params": params()}, *batch)[0])


def test_packed_equals_alone():
    packed = logits_of(row(TEXTS), row(TEXTS[::-1]))[0]
    begin = 0
    for text in TEXTS:
        size = len(text) + 2
        alone = logits_of(row([text]), row(["x"]))[0, :size]
        np.testing.assert_allclose(packed[begin : begin + size], alone, atol=2e-5, rtol=0)
        begin += size


def test_rows_are_apart():
    first = row(TEXTS)
    assert (logits_of(first, row(["one"]))[0] == logits_of(first, row(["another row"]))[0]).all()


def test_changing_a_byte_changes_nothing_before_it():
    ids, documents, starts = row(TEXTS)
    before = logits_of((ids, documents, starts), (ids, documents, starts))[0]
    for position in (1, 7, 21, 22, 23, 30, 43, 44, 50):
        changed = ids.copy()
        changed[position] = 4 + (changed[position] + 100) % 256
        again = []
        for begin, end in ((0, 22), (22, 44), (44, 60)):
            again.append(force_starts(patch_starts(SPACE, changed[begin:end]))[:-1])
        new_starts = np.append(np.concatenate(again), [True] + [False] * 4)
        assert new_starts.shape == starts.shape
        after = logits_of((changed, documents, new_starts), (ids, documents, starts))[0]
        assert (after[: position - 1] == before[: position - 1]).all()
        np.testing.assert_allclose(after[:position], before[:position], atol=1e-6)
        assert abs(after[position] - before[position]).max() > 1e-4


def test_no_gradient_from_later_bytes():
    """The gradient of each logit with respect to the byte embeddings of later positions is zero.

    Embeddings enter per position, so we differentiate with respect to a perturbation of them: the
    Jacobian over (logit position, byte position) must be lower triangular, and block diagonal over
    documents. This goes through hashing's sum, pooling, the lag and every attention.
    """
    ids, documents, starts = (jnp.asarray(x)[None] for x in row(TEXTS))
    model = BLT(CONFIG, P)
    table = params()["encoder"]["bytes_VE"]
    # One alphabet entry per position, so that each position has an embedding of its own.
    own = params() | {"encoder": params()["encoder"] | {"bytes_VE": table[ids[0]]}}
    own["encoder"].pop("ngrams_RME")
    bare = dataclasses.replace(CONFIG, hash=HashConfig(sizes=()))
    model = BLT(bare, P)

    @jax.jit
    def influence(rows_NE):
        """[logit position, byte position]: squared gradient of a random mix of each logit row."""
        mix_NV = jax.random.normal(jax.random.key(1), (N, 260))

        def mixed(rows_NE):
            p = own | {"encoder": own["encoder"] | {"bytes_VE": rows_NE}}
            positions = jnp.arange(N, dtype=jnp.int32)[None]
            logits = model.apply({"params": p}, positions, documents, starts)[0][0]
            return (logits * mix_NV).sum(-1)

        return (jax.jacrev(mixed)(rows_NE) ** 2).sum(-1)

    # bytes_VE has 260 rows in the module's eyes; only its first N are looked up here.
    grid = np.asarray(influence(jnp.pad(table[ids[0]], ((0, 260 - N), (0, 0)))))[:, :N]
    used = int((documents > 0).sum())
    same = np.asarray(documents[0][:, None] == documents[0][None])
    allowed = np.tril(np.ones((N, N), bool)) & same
    assert not grid[:used][~allowed[:used]].any()
    assert (np.diag(grid)[:used] > 0).all()


def test_hash_windows_stop_at_documents():
    ids, documents, starts = row(TEXTS)
    changed = ids.copy()
    changed[20] = 100  # the last byte of the first document
    other = logits_of((changed, documents, starts), (ids, documents, starts))
    assert (other[0, 22:60] == other[1, 22:60]).all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["products", "full"])
def test_scan_equals_loop_and_remat_equals_none(policy):
    ids, documents, starts = (jnp.asarray(x)[None] for x in row(TEXTS))
    _, out = program()({"params": params()}, ids, documents, starts)
    latent = params()["latent"]
    ranges = row_patches(documents, starts, P, CONFIG.local.window).latent_ranges
    x_BPD = out["slots_BSE"].reshape(1, P, -1) @ latent["widen_KED"].reshape(-1, 48)
    block = Block(block_size(CONFIG.latent), Sliding(P), jnp.float32, None)
    for layer in range(CONFIG.latent.layers):
        weights = jax.tree.map(lambda x, layer=layer: x[layer], latent["blocks"])
        x_BPD, _ = block.apply({"params": weights}, x_BPD, ranges)
    np.testing.assert_allclose(x_BPD, out["latent_BPD"], atol=1e-5)

    def loss(remat):
        config = dataclasses.replace(
            CONFIG,
            latent=dataclasses.replace(CONFIG.latent, remat=remat),
            local=dataclasses.replace(CONFIG.local, remat=remat),
        )
        model = BLT(config, P)
        return jax.jit(
            jax.grad(lambda p: (model.apply({"params": p}, ids, documents, starts)[0] ** 2).mean())
        )(params())

    for plain, rematted in zip(
        jax.tree.leaves(loss("none")), jax.tree.leaves(loss(policy)), strict=True
    ):
        np.testing.assert_allclose(plain, rematted, atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "decoder"), [("none", "none"), ("last", "first"), ("all", "all")]
)
def test_cross_attention_layers(encoder, decoder):
    config = dataclasses.replace(CONFIG, cross=CrossConfig(2, 2, encoder, decoder))
    model = BLT(config, P)
    shapes = jax.eval_shape(lambda key: initial_params(model.config, key), jax.random.key(0))
    crosses = [name for name in shapes["encoder"] if name.startswith("cross")]
    assert len(crosses) == {"none": 0, "last": 1, "all": 2}[encoder]
    crosses = [name for name in shapes["decoder"] if name.startswith("cross")]
    assert len(crosses) == {"none": 0, "first": 1, "all": 2}[decoder]
    batch = [jnp.asarray(x)[None] for x in row(TEXTS)]
    logits, _ = jax.eval_shape(model.apply, {"params": shapes}, *batch)
    assert logits.shape == (1, N, 260) and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("byte_lm_100m.py", 99_512_064),
        ("blt.py:400m", 2_872_692_480),
        ("blt.py:1b", 4_533_879_808),
        ("blt.py:2b", 5_323_750_400),
        ("blt.py:4b", 7_332_647_936),
        ("blt.py:8b", 10_553_570_560),
    ],
)
def test_released_sizes(name, total):
    config = load_config(f"configs/{name}")
    model = make_model(config.model, config.data.max_patches, jnp.bfloat16, None)
    shapes = jax.eval_shape(lambda key: initial_params(model.config, key), jax.random.key(0))
    assert parameter_count(shapes, config.model)["total"] == total


def test_hash_table_padding_is_zero():
    tables = params()["encoder"]["ngrams_RME"]
    assert tables.shape == (4, 512, 32) and HashConfig().stored_rows == 500224
    assert tables[:, :101].any(axis=-1).all() and not tables[:, 101:].any()


def test_byte_lm_sees_its_window_and_no_more():
    config = ByteLMConfig(layers=1, width=16, heads=2, hidden=16, window=5)
    model = ByteLM(config)
    params = initial_params(model.config, jax.random.key(0))
    run = jax.jit(lambda ids: model.apply({"params": params}, ids, jnp.ones_like(ids))[0])
    ids = jnp.asarray(encode("windows of five bytes"), jnp.int32)[None]
    change = np.asarray(run(ids.at[0, 8].add(1)) != run(ids)).any(-1)[0]
    assert change.nonzero()[0].tolist() == [8, 9, 10, 11, 12]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_tpu_interpreted", "pallas_gpu_interpreted"])
def test_kernels_in_the_whole_model(implementation, by_tiles):
    """Scanned, rematerialised and packed, kernels give the loss and gradients of plain XLA."""
    given = [jnp.asarray(part)[None] for part in row(TEXTS)]
    config = dataclasses.replace(
        CONFIG,
        latent=dataclasses.replace(CONFIG.latent, remat="full"),
        local=dataclasses.replace(CONFIG.local, remat="full"),
    )

    def outcome(name):
        model = BLT(config, P, implementation=name)

        def loss(params):
            return (model.apply({"params": params}, *given)[0] ** 2).mean()

        options = {"xla_backend_optimization_level": 0}
        return jax.jit(jax.value_and_grad(loss), compiler_options=options)(params())

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        outcome(implementation),
        outcome("xla"),
    )
