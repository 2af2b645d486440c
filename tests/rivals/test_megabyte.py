"""MegaByte against its public implementation, and its invariants."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jacobian import jacobian
from made_once import made_once

from bltjax.config.letters import suffix_axes
from bltjax.config.model import REMAT, ModelConfig
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.params import flattened
from bltjax.rivals import megabyte
from bltjax.rivals.decoding.megabyte import cached_megabyte
from bltjax.rivals.megabyte import MegaByte, MegaByteConfig, slots_of
from bltjax.weights.rivals import megabyte as weights

CONFIG = MegaByteConfig(
    patch_bytes=4, context=64, global_layers=2, global_width=32, global_heads=2,
    local_layers=2, local_width=16, local_heads=2,
)  # fmt: skip
N, P = 48, 20
SIZES = (11, 16, 9, 5)  # of documents: ragged, and whole slots
UNOPTIMISED = {"xla_backend_optimization_level": 0}  # these programs run once


def initial(config):
    ones = jnp.ones((1, 2), jnp.int32)
    return MegaByte(config, 2).init(jax.random.key(0), ones, ones)["params"]


def perturbed(params):
    """Parameters away from their initial values, as scales of 1 are."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@made_once
def params():
    return jax.jit(lambda: perturbed(initial(CONFIG)))()


@functools.cache
def program(slots=P):
    model, own = MegaByte(CONFIG, slots), params()
    return jax.jit(lambda *arrays: model.apply({"params": own}, *arrays)[0])


def document(size, seed):
    """BOS and random bytes."""
    return np.array([1, *np.random.default_rng(seed).integers(4, 260, size - 1)])


def row(documents, length=N):
    """Ids and document numbers of a row, and each document's slice of it."""
    ids, numbers, places, begin = np.zeros(length, np.int32), np.zeros(length, np.int32), [], 0
    for number, text in enumerate(documents, start=1):
        places.append(slice(begin, begin + len(text)))
        ids[places[-1]], numbers[places[-1]] = text, number
        begin += len(text)
    return ids, numbers, places


@functools.cache
def public():
    """The golden file, our settings and parameters."""
    found = golden.read("megabyte")
    tensors = {name: golden.tensor_of(array) for name, array in found.weights.items()}
    values = found.settings | {"model_type": "megabyte"}
    config, left, notes = weights.read_settings(values, tensors, "config.json")
    assert left.keys() == found.weights.keys() and not notes
    shapes = flattened(jax.eval_shape(lambda: initial(config.model)))
    shapes = {path: leaf.shape for path, leaf in shapes.items()}
    return found, config, golden.params_of(found.weights, weights.parts(config.model), shapes)


@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_golden(implementation):
    found, config, params = public()
    assert (config.max_bytes, config.max_patches) == (160, 40)
    assert set(megabyte.FORWARD_INPUTS) == set(found.inputs)

    def loss(params):
        out = megabyte.forward(config, params, found.inputs, jnp.float32, implementation)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            out["logits"], found.inputs["targets"]
        )
        return losses.mean(), out

    both = jax.value_and_grad(loss, has_aux=True)
    (value, out), grads = jax.jit(both, compiler_options=UNOPTIMISED)(params)
    expected = dict(found.expected)
    np.testing.assert_allclose(value, expected.pop("loss"), rtol=1e-5)
    out["logits"] = out["logits"][:, found.positions]
    assert out.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(out[name], array, atol=golden.ABSOLUTE, rtol=0, err_msg=name)
    golden.check_gradient_norms(grads, weights.parts(config.model), found.gradient_norms)


def test_a_grid_for_each_document():
    numbers = row([document(size, 0) for size in SIZES])[1]
    slots = slots_of(jnp.asarray(numbers)[None], 4, 12)
    assert slots.ranges.position_BT[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert slots.begin_BP[0].tolist() == [0, 4, 8, 11, 15, 19, 23, 27, 31, 35, 36, 40]
    assert slots.byte_BPA[0, 2:4].tolist() == [[8, 9, 10, -1], [11, 12, 13, 14]]
    assert slots.place_BN[0, 8:13].tolist() == [8, 9, 10, 12, 13]
    assert (slots.place_BN[0, 41:] == -1).all()
    # The inverse of each other, in a row with more slots than there is room for, too.
    slots = slots_of(jnp.asarray(numbers)[None], 4, 5)
    byte_S = np.asarray(slots.byte_BPA[0]).reshape(-1)
    for byte, place in enumerate(slots.place_BN[0].tolist()):
        assert place == -1 or byte_S[place] == byte
    assert (byte_S >= 0).sum() == (slots.place_BN >= 0).sum() == 19


def test_packed_equals_alone_and_rows_are_apart():
    texts = [document(size, seed) for seed, size in enumerate(SIZES)]
    orders = ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3], [0], [1], [2], [3])
    rows = [row([texts[i] for i in order]) for order in orders]
    ids, numbers = (np.stack(part) for part in list(zip(*rows, strict=True))[:2])
    logits = np.asarray(program()(ids, numbers))
    assert np.isfinite(logits).all()
    for order, (_, _, places), found in zip(orders, rows, logits, strict=True):
        for i, place in zip(order, places, strict=True):
            alone = logits[3 + i, : len(texts[i])]
            np.testing.assert_allclose(found[place], alone, atol=1e-5, rtol=0)
    # Of a row with more slots than there are, those that exist are as before.
    cut = np.asarray(program(slots=6)(ids, numbers))
    assert np.isfinite(cut).all()
    np.testing.assert_allclose(cut[0, :23], logits[0, :23], atol=1e-5, rtol=0)


def test_no_byte_reaches_logits_before_it_or_of_another_document():
    texts = [document(size, seed) for seed, size in enumerate(SIZES)]
    ids, numbers, _ = row(texts)
    used = sum(SIZES)
    changed = np.repeat(ids[None], used + 1, axis=0)
    at = np.arange(used)
    changed[at, at] = 4 + (changed[at, at] + 100) % 256
    logits = np.asarray(program()(changed, np.repeat(numbers[None], used + 1, axis=0)))
    moved = abs(logits[:-1] - logits[-1]).max(axis=-1)[:, :used]  # [changed byte, logits]
    allowed = np.triu(numbers[:used, None] == numbers[None, :used])
    # A document's first byte, its BOS, is never read: its first slot has pads in its place.
    first = np.diff(numbers[:used], prepend=0) > 0
    assert moved[~allowed].max() < 1e-6 and np.diag(moved)[~first].min() > 1e-4
    assert not moved[first].any()


def test_no_gradient_from_later_bytes_other_documents_or_other_rows():
    rows = [row([document(size, 0) for size in sizes])[1] for sizes in (SIZES, SIZES[::-1])]
    numbers = np.stack(rows)
    # One id per position, so that each position has an embedding of its own.
    ids = np.arange(2 * N, dtype=np.int32).reshape(2, N)
    mix_BNV, own = jax.random.normal(jax.random.key(1), (2, N, 260)), params()

    def influence(tables):
        """[row and position of logits, id]: squared gradient of a mix of the logits."""

        def mixed(tables):
            logits = MegaByte(CONFIG, P).apply({"params": own | tables}, ids, numbers)[0]
            return (logits * mix_BNV).sum(-1).reshape(-1)

        grads = jacobian(mixed, tables)
        return sum((grad**2).sum(-1) for grad in grads.values())

    tables = {name: own[name] for name in ("global_bytes_VY", "local_bytes_VE")}
    grid = np.asarray(jax.jit(influence)(tables))[:, : 2 * N]
    flat = (numbers + 10 * np.arange(2)[:, None] * (numbers > 0)).reshape(-1)
    real = flat > 0
    allowed = np.tril(flat[:, None] == flat[None])
    assert not grid[real][~allowed[real]].any()
    first = np.diff(flat, prepend=0) > 0  # never read
    assert (np.diag(grid)[real & ~first] > 0).all()


def test_scan_equals_loop_and_remat_equals_none():
    ids, numbers, _ = row([document(size, seed) for seed, size in enumerate(SIZES)])
    config = dataclasses.replace(CONFIG, local_layers=1)
    own = params() | {"local": {"block_0": params()["local"]["block_0"]}}

    def loss(params, remat, scanned=True):
        model = MegaByte(dataclasses.replace(config, remat=remat), P, scanned=scanned)
        logits = model.apply({"params": params}, ids[None], numbers[None])[0]
        return (logits[:, : sum(SIZES)] ** 2).mean()

    def gradients(params):
        loop = jax.grad(loss)(params | {"global": unscanned(params["global"])}, "none", False)
        return {remat: jax.grad(loss)(params, remat) for remat in REMAT}, loop

    found, loop = jax.jit(gradients, compiler_options=UNOPTIMISED)(own)
    plain = found["none"]

    def close(one, other):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)

    jax.tree.map(close, plain, found["products"])
    jax.tree.map(close, plain, found["full"])
    jax.tree.map(close, plain | {"global": unscanned(plain["global"])}, loop)


@pytest.mark.slow
def test_kernels_see_the_slots_of_a_row_at_once():
    """Logits, gradients, and the local keys and values of prompts are those of slots apart."""
    ids, numbers, _ = row([document(size, seed) for seed, size in enumerate(SIZES)])

    def outcome(name):
        def loss(params):
            model = MegaByte(CONFIG, P, implementation=name)
            logits, out = model.apply({"params": params}, ids[None], numbers[None])
            return (logits[:, : sum(SIZES)] ** 2).mean(), (logits, out["local_kv"])

        both = jax.value_and_grad(loss, has_aux=True)
        return jax.jit(both, compiler_options=UNOPTIMISED)(params())

    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4),
        outcome("pallas_tpu_interpreted"),
        outcome("xla"),
    )


def test_names_give_ranks_and_sizes_of_weights():
    leaves = flattened(jax.eval_shape(lambda: initial(CONFIG)))
    for path, leaf in leaves.items():
        letters = suffix_axes(path.rpartition("/")[2])
        assert len(letters) == leaf.ndim, path
    wide = dataclasses.replace(CONFIG, global_width=128)
    drawn = flattened(jax.jit(lambda: initial(wide))())
    for path, sigma in (
        ("global/blocks/up_LDF", 128**-0.5), ("global/blocks/down_LFD", 512**-0.5),
        ("global_bytes_VY", 1.0), ("narrow_YE", (3 * 32) ** -0.5), ("head_EV", 16**-0.5),
    ):  # fmt: skip
        assert abs(float(drawn[path].std()) / sigma - 1) < 0.1, path


def test_cached_logits_equal_the_full_pass():
    """Rows of different lengths, some of which pause, past two doublings of the global caches."""
    model = cached_megabyte(ModelConfig(CONFIG, None, N, P), None, jnp.float32)
    texts = np.stack([document(N, seed) for seed in range(4)]).astype(np.int32)
    full = np.asarray(program()(texts, np.ones_like(texts)))
    lengths = np.array([1, 3, 4, 8], np.int32)
    weights = jax.jit(model.prepared)(params(), None)
    memory = jax.jit(model.prefill)(weights, texts[:, :8], lengths)
    assert model.capacity(memory) == model.needs(8) == (3,)
    advance = jax.jit(model.advance)
    draw, doublings = np.random.default_rng(0), 0
    while (counts := np.asarray(memory.count_B)).min() < 40:
        logits, memory = model.predict(weights, memory)
        for b, count in enumerate(counts):
            np.testing.assert_allclose(logits[b], full[b, count - 1], atol=2e-5, rtol=0)
        if model.full(memory).any():
            memory = model.grown(memory, 2 * model.capacity(memory)[0])
            doublings += 1
        go = (draw.random(4) < 0.8) & (counts < N)
        ids = np.where(go, texts[np.arange(4), np.minimum(counts, N - 1)], 7).astype(np.int32)
        memory = advance(weights, memory, ids, go)
    assert doublings == 3 and not model.full(memory, ahead=8).all()


def test_flops():
    """The published figure of 201M + 51M parameters, those of small sizes, and by hand."""
    assert round(megabyte.paper_flops(MegaByteConfig(), 4096, 1024) / 1e6) == 219
    for config, expected in (
        (MegaByteConfig(8, 2048, 3, 384, 6, 4, 128, 2), 3.1),
        (MegaByteConfig(4, 2048, 3, 256, 4, 3, 128, 2), 2.6),
    ):
        found = megabyte.forward_flops(config, 2048, 2048 // config.patch_bytes) / 2048
        assert round(found / 1e6, 1) == expected
    # By hand: 2 slots of 2 bytes; a layer of width 4 each, and 260 ids.
    tiny = MegaByteConfig(2, 4, 1, 4, 1, 1, 4, 1)
    block = 24 * 4**2
    assert megabyte.forward_flops(tiny, 4, 2) == (
        (2 * block + 4 * 4 * 3) + (4 * block + 4 * 4 * 6) + 2 * 4 * 2 * 4 + 4 * 2 * 4 * 260
    )
    assert megabyte.recomputed_flops(tiny, 4, 2) == 2 * 4 * 3
    whole = megabyte.recomputed_flops(dataclasses.replace(tiny, remat="full"), 4, 2)
    assert whole == (2 * block + 4 * 4 * 3 + 2 * 4 * 3) + (4 * block + 4 * 4 * 6) - 6 * 2 * 16 * 4


def test_weights_there_and_back():
    found, config, params = public()
    back = golden.public(params, weights.parts(config.model))
    assert back.keys() == found.weights.keys()
    for name, array in found.weights.items():
        assert np.array_equal(back[name], array), name
    written = weights.written_settings(config, "float32")
    assert written == found.settings | {"model_type": "megabyte"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_padding": False}, "use_padding is False"),
        ({"qk_layer_norm": False}, "qk_layer_norm is False"),
        ({"layer_norm": "RMSNorm"}, "layer_norm is 'RMSNorm'"),
        ({"vocab_size": 512}, "vocab_size is 512"),
        ({"patch_size": 3}, "patch_bytes \\(3\\) must divide megabyte.context \\(160\\)"),
        ({"d_key": 12}, "d_key \\(12\\) must divide d_model \\(32\\)"),
        ({"n_layers": "2"}, "n_layers is '2', not int"),
        ({"n_local_layers": 0}, "n_local_layers is 0"),
        ({"dropout": 0.1}, "'dropout'"),
        ({"model_type": "spacebyte"}, "model_type is 'spacebyte'"),
    ],
)
def test_settings_refused(change, message):
    values = public()[0].settings | {"model_type": "megabyte"} | change
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        weights.read_settings(values, {}, "config.json")


def test_what_their_config_cannot_say_is_refused():
    for change, message in (
        ({"alphabet": "blt"}, "alphabet 'blt'"),
        ({"local_heads": 1}, "heads of other widths"),
        ({"rope_theta": 5e5}, "rope_theta 500000.0"),
    ):
        own = public()[1]
        model = dataclasses.replace(own.model, **change)
        with pytest.raises(ValueError, match=message):
            weights.written_settings(dataclasses.replace(own, model=model), "float32")
    values = public()[0].settings | {"model_type": "megabyte"}
    del values["d_local"]
    with pytest.raises(ValueError, match="lacks the field d_local"):
        weights.read_settings(values, {}, "config.json")
    with pytest.raises(ValueError, match="tokens have 161 positions"):
        tokens = jnp.zeros((1, 161), jnp.int32)
        megabyte.forward(public()[1], {}, {"tokens": tokens}, jnp.float32, None)
