"""SpaceByte against its public implementation, and its invariants."""

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
from bltjax.config.model import REMAT, ModelConfig, Patching
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.params import flattened
from bltjax.rivals import spacebyte
from bltjax.rivals.decoding.spacebyte import cached_spacebyte
from bltjax.rivals.spacebyte import SpaceByte, SpaceByteConfig
from bltjax.text.alphabet import encode
from bltjax.text.patching import document_starts
from bltjax.weights.rivals import spacebyte as weights

CONFIG = SpaceByteConfig(
    window=5, context=64, global_context=20, initial_layers=1, global_layers=2, global_width=32,
    global_heads=2, local_layers=2, local_width=16, local_heads=2,
)  # fmt: skip
N, P = 64, 40
SPACE = Patching(mode="space")
TEXTS = ("A rival, by words.", "日本 x = f(y, z)", "spaces")
UNOPTIMISED = {"xla_backend_optimization_level": 0}  # these programs run once


def initial(config):
    ones = jnp.ones((1, 2), jnp.int32)
    arrays = ones, ones, jnp.ones((1, 3), bool)
    return SpaceByte(config, 2).init(jax.random.key(0), *arrays)["params"]


@made_once
def params():
    """Parameters away from their initial values, as scales of 1 are."""

    def perturbed():
        leaves, tree = jax.tree.flatten(initial(CONFIG))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        pairs = zip(leaves, keys, strict=True)
        noisy = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in pairs]
        return jax.tree.unflatten(tree, noisy)

    return jax.jit(perturbed)()


@functools.cache
def program(slots=P):
    model, own = SpaceByte(CONFIG, slots), params()
    return jax.jit(lambda *arrays: model.apply({"params": own}, *arrays)[0])


def row(documents, length=N):
    """Ids, document numbers and starts of a row, as the packer makes it of whole documents."""
    ids, numbers = np.zeros(length, np.int32), np.zeros(length, np.int32)
    starts, begin = np.zeros(length + 1, bool), 0
    for number, text in enumerate(documents, start=1):
        end = begin + len(text)
        ids[begin:end], numbers[begin:end] = text, number
        starts[begin : end + 1] = document_starts(SPACE, text, None)
        begin = end
    return ids, numbers, starts


def stacked(rows):
    return tuple(map(np.stack, zip(*rows, strict=True)))


@functools.cache
def public():
    """The golden file, our settings and parameters."""
    found = golden.read("spacebyte")
    tensors = {name: golden.tensor_of(array) for name, array in found.weights.items()}
    values = found.settings | {"model_type": "spacebyte"}
    config, left, notes = weights.read_settings(values, tensors, "config.json")
    assert left.keys() == found.weights.keys()
    assert len(notes) == 1 and "13 keys" in notes[0]
    shapes = flattened(jax.eval_shape(lambda: initial(config.model)))
    shapes = {path: leaf.shape for path, leaf in shapes.items()}
    return found, config, golden.params_of(found.weights, weights.parts(config.model), shapes)


def public_slots(tokens):
    """The positions of global blocks in one row, in numpy."""
    word = np.array([bytes([x]).isalnum() or 0x80 <= x <= 0xBF for x in tokens])
    return np.flatnonzero((~word & np.append(True, word[:-1])) | (tokens == 255))


@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_golden(implementation):
    found, config, params = public()
    assert (config.max_bytes, config.max_patches) == (160, 40)
    assert set(spacebyte.FORWARD_INPUTS) == set(found.inputs)
    expected, most = dict(found.expected), config.model.global_context
    counts, positions, scored = (
        expected.pop(name) for name in ("global_counts", "global_positions", "targets_scored")
    )
    for b, tokens in enumerate(found.inputs["tokens"]):
        slots = public_slots(tokens)
        assert positions[b, : counts[b]].tolist() == slots[:most].tolist()
        if len(slots) > most:
            assert (scored[b] == -1).argmax() == slots[most]

    def loss(params):
        out = spacebyte.forward(config, params, found.inputs, jnp.float32, implementation)
        # Rows weigh equally, however few targets they score; those that didn't fit are -1.
        losses = optax.softmax_cross_entropy_with_integer_labels(
            out["logits"], jnp.maximum(scored, 0)
        )
        return losses.mean(axis=1, where=scored >= 0).mean(), out

    both = jax.value_and_grad(loss, has_aux=True)
    (value, out), grads = jax.jit(both, compiler_options=UNOPTIMISED)(params)
    np.testing.assert_allclose(value, expected.pop("loss"), rtol=1e-5)
    del expected["logits_periodic_row0"]
    assert out.keys() == expected.keys()
    for name, array in expected.items():
        if name.startswith("global"):  # what follows the slots that there are is filler
            pairs = [(out[name][b, :count], array[b, :count]) for b, count in enumerate(counts)]
        else:
            pairs = [(out[name][:, found.positions], array)]
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, atol=golden.ABSOLUTE, rtol=0, err_msg=name)
    golden.check_gradient_norms(grads, weights.parts(config.model), found.gradient_norms)


def test_golden_with_slots_at_fixed_distances():
    found, config, params = public()
    tokens = found.inputs["tokens"][:1, :80]
    distance = config.model.context // config.model.global_context
    starts = np.append(False, np.arange(80) % distance == 0)[None]
    run = jax.jit(SpaceByte(config.model, 40).apply, compiler_options=UNOPTIMISED)
    logits, _ = run({"params": params}, tokens, np.ones_like(tokens), starts)
    expected = found.expected["logits_periodic_row0"]
    np.testing.assert_allclose(logits, expected, atol=golden.ABSOLUTE, rtol=0)


def test_without_targets_what_does_not_fit_is_bos():
    found, config, params = public()
    inputs = {"tokens": found.inputs["tokens"]}

    def logits(params):
        return spacebyte.forward(config, params, inputs, jnp.float32, "dense")["logits"]

    logits = np.asarray(jax.jit(logits, compiler_options=UNOPTIMISED)(params))
    at = found.positions
    lost = found.expected["targets_scored"][:, at] == -1
    kept = found.expected["logits"][~lost]
    np.testing.assert_allclose(logits[:, at][~lost], kept, atol=golden.ABSOLUTE, rtol=0)
    assert lost.any() and (logits[:, at][lost] == [-1e4] * 255 + [1e4]).all()


def test_packed_equals_alone_and_rows_are_apart():
    texts = [encode(text) for text in TEXTS]
    orders = ([0, 1, 2], [2, 0, 1], [1, 0], [0], [1], [2])
    logits = np.asarray(program()(*stacked([row([texts[i] for i in order]) for order in orders])))
    assert np.isfinite(logits).all()
    for order, found in zip(orders, logits, strict=True):
        begin = 0
        for i in order:
            place = slice(begin, begin := begin + len(texts[i]))
            alone = logits[3 + i, : len(texts[i])]
            np.testing.assert_allclose(found[place], alone, atol=1e-5, rtol=0)


def test_slots_that_do_not_fit_are_dropped():
    """In a row, and in a document: those before them are as ever, and nothing is out of bounds."""
    texts = [encode(text) for text in TEXTS]
    rows = stacked([row(texts)])
    whole, cut = (np.asarray(program(slots)(*rows))[0] for slots in (P, 5))
    fifth = np.flatnonzero(rows[2][0, 1:])[5]
    np.testing.assert_allclose(cut[:fifth], whole[:fifth], atol=1e-5, rtol=0)
    assert np.isfinite(cut).all() and abs(cut[fifth] - whole[fifth]).max() > 1e-3
    # 24 slots of a document, of which 20 have an embedding: as in a row of so many.
    many = stacked([row([encode("a " * 24)])])
    long, short = (np.asarray(program(slots)(*many))[0] for slots in (P, 20))
    np.testing.assert_allclose(long[:50], short[:50], atol=1e-5, rtol=0)


def test_no_byte_reaches_logits_before_it_or_of_another_document():
    texts = [encode(text) for text in TEXTS]
    sizes = [len(text) for text in texts]
    rows, used = [], sum(sizes)
    for at in (*range(used), None):
        changed = [text.copy() for text in texts]
        if at is not None:
            number = np.searchsorted(np.cumsum(sizes), at, side="right")
            place = at - sum(sizes[:number])
            # Another byte changes the slots, too, of its own position and the next.
            changed[number][place] = 4 + (changed[number][place] + 83) % 256
        rows.append(row(changed))
    logits = np.asarray(program()(*stacked(rows)))
    moved = abs(logits[:-1] - logits[-1]).max(axis=-1)[:, :used]  # [changed byte, logits]
    numbers = rows[-1][1][:used]
    allowed = np.triu(numbers[:, None] == numbers[None])
    assert moved[~allowed].max() < 1e-6 and np.diag(moved).min() > 1e-4


def test_no_gradient_from_later_bytes_other_documents_or_other_rows():
    texts = [encode(text) for text in TEXTS]
    _, numbers, starts = stacked([row(texts), row(texts[::-1])])
    # One id per position, so that each position has an embedding of its own.
    ids = np.arange(2 * N, dtype=np.int32).reshape(2, N)
    mix_BNV, own = jax.random.normal(jax.random.key(1), (2, N, 260)), params()

    def influence(bytes_VE):
        """[row and position of logits, id]: squared gradient of a mix of the logits."""

        def mixed(bytes_VE):
            tree = own | {"bytes_VE": bytes_VE}
            logits = SpaceByte(CONFIG, P).apply({"params": tree}, ids, numbers, starts)[0]
            return (logits * mix_BNV).sum(-1).reshape(-1)

        return (jacobian(mixed, bytes_VE) ** 2).sum(-1)

    grid = np.asarray(jax.jit(influence)(own["bytes_VE"]))[:, : 2 * N]
    flat = (numbers + 10 * np.arange(2)[:, None] * (numbers > 0)).reshape(-1)
    real = flat > 0
    allowed = np.tril(flat[:, None] == flat[None])
    assert not grid[real][~allowed[real]].any() and (np.diag(grid)[real] > 0).all()


def test_scan_equals_loop_and_remat_equals_none():
    arrays = stacked([row([encode(text) for text in TEXTS])])
    real = arrays[1][..., None] > 0

    def loss(params, remat, scanned=True):
        model = SpaceByte(dataclasses.replace(CONFIG, remat=remat), P, scanned=scanned)
        logits = model.apply({"params": params}, *arrays)[0]
        return jnp.where(real, logits**2, 0).mean()

    def gradients(params):
        loop = jax.grad(loss)(params | {"global": unscanned(params["global"])}, "none", False)
        return {remat: jax.grad(loss)(params, remat) for remat in REMAT}, loop

    found, loop = jax.jit(gradients, compiler_options=UNOPTIMISED)(params())
    plain = found["none"]

    def close(one, other):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)

    jax.tree.map(close, plain, found["products"])
    jax.tree.map(close, plain, found["full"])
    jax.tree.map(close, plain | {"global": unscanned(plain["global"])}, loop)


def test_names_give_ranks():
    for path, leaf in flattened(jax.eval_shape(lambda: initial(CONFIG))).items():
        assert len(suffix_axes(path.rpartition("/")[2])) == leaf.ndim, path


def test_cached_logits_equal_the_full_pass():
    """Rows of different lengths, some of which pause, past doublings of the global caches and, in
    one row, past the slots that have an embedding."""
    model = cached_spacebyte(
        ModelConfig(CONFIG, SPACE, N, CONFIG.global_context), None, jnp.float32
    )
    texts = ("a plain sentence, in which words are as long as ever", "a " * 30, "y = f(x); " * 6)
    texts = np.stack([encode(text, eos=False)[:51] for text in texts])  # one more than is run
    rows = stacked([row([text]) for text in texts])
    full = np.asarray(program()(*rows))
    lengths = np.array([1, 3, 8], np.int32)
    weights = jax.jit(model.prepared)(params(), None)
    memory = jax.jit(model.prefill)(weights, texts[:, :8], lengths)
    assert model.capacity(memory) == model.needs(8) == (9,) and model.needs(50) == (21,)
    advance = jax.jit(model.advance)
    draw, doublings = np.random.default_rng(0), 0
    while (counts := np.asarray(memory.count_B)).min() < 50:
        logits, memory = model.predict(weights, memory)
        for b, count in enumerate(counts):
            np.testing.assert_allclose(logits[b], full[b, count - 1], atol=2e-5, rtol=0)
        if model.full(memory).any():
            memory = model.grown(memory, 2 * model.capacity(memory)[0])
            doublings += 1
        go = (draw.random(3) < 0.8) & (counts < 50)
        ids = np.where(go, texts[np.arange(3), np.minimum(counts, 49)], 36).astype(np.int32)
        memory = advance(weights, memory, ids, go)
    assert doublings == 2 and not model.full(memory, ahead=30).any()
    assert memory.slots_B.tolist() == [min(n, 20) for n in rows[2][:, 1:51].sum(axis=1)]


def test_flops():
    """The published figure of 201M + 50M parameters, those of small sizes, and by hand."""
    published = SpaceByteConfig()
    assert round(spacebyte.paper_flops(published, 6144, 1024) / 1e6) == 196
    for slots, layers, expected in ((400, 4, 3.2), (456, 5, 3.8)):
        config = SpaceByteConfig(64, 2048, slots, 2, 4, 256, 4, layers, 128, 2)
        assert round(spacebyte.forward_flops(config, 2048, slots) / 2048 / 1e6, 1) == expected
    # By hand: 4 bytes that see 2, 2 slots; 2 layers of width 4 and 1 of width 8, and 260 ids.
    tiny = SpaceByteConfig(2, 4, 2, 1, 1, 8, 1, 2, 4, 1)
    assert spacebyte.forward_flops(tiny, 4, 2) == (
        2 * (4 * 24 * 16 + 4 * 4 * 7) + (2 * 24 * 64 + 4 * 8 * 3) + 2 * 4 * 4 * 260
    )
    assert spacebyte.recomputed_flops(tiny, 4, 2) == 2 * (2 * 4 * 7) + 2 * 8 * 3
    whole = spacebyte.recomputed_flops(dataclasses.replace(tiny, remat="full"), 4, 2)
    assert whole == (
        2 * (4 * 16 * 16 + 4 * 4 * 7 + 2 * 4 * 7) + (2 * 16 * 64 + 4 * 8 * 3 + 2 * 8 * 3)
    )


def test_weights_there_and_back():
    found, config, params = public()
    back = golden.public(params, weights.parts(config.model))
    assert back.keys() == found.weights.keys()
    for name, array in found.weights.items():
        assert np.array_equal(back[name], array), name
    written = weights.written_settings(config, "float32")
    assert written == found.settings | {"model_type": "spacebyte"}


def test_the_window_of_weights_from_cuda():
    values = public()[0].settings | {"model_type": "spacebyte"}
    for keys in (12, 13):
        config, _, notes = weights.read_settings(values, {}, "config.json", window_keys=keys)
        assert config.model.window == keys and not notes
    with pytest.raises(ValueError, match=r"local_attention_window is 12, so .* not 64"):
        weights.read_settings(values, {}, "config.json", window_keys=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_method": "periodic"}, "patch_method is 'periodic'"),
        ({"BOS": 254}, "BOS is 254"),
        ({"local_attention_window": 0}, "local_attention_window is 0"),
        ({"local_attention_window": None}, "local_attention_window is None, not int"),
        ({"n_initial_layers": 3}, "initial_layers \\(3\\) must be fewer"),
        ({"d_local": 64}, "local_width \\(64\\) must not exceed"),
        ({"use_padding": True}, "'use_padding'"),
        ({"model_type": "megabyte"}, "model_type is 'megabyte'"),
    ],
)
def test_settings_refused(change, message):
    values = public()[0].settings | {"model_type": "spacebyte"} | change
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        weights.read_settings(values, {}, "config.json")


def test_defaults_and_what_their_config_cannot_say():
    values = public()[0].settings | {"model_type": "spacebyte", "n_initial_layers": None}
    config, _, _ = weights.read_settings(values, {}, "config.json")
    assert config.model.initial_layers == 1
    model = dataclasses.replace(config.model, window=1)
    with pytest.raises(ValueError, match="2 keys at least"):
        weights.written_settings(dataclasses.replace(config, model=model), "float32")
    with pytest.raises(ValueError, match="alphabet 'blt'"):
        weights.written_settings(ModelConfig(CONFIG, SPACE, N, CONFIG.global_context), "float32")
    with pytest.raises(ValueError, match="tokens have 161 positions"):
        tokens = jnp.zeros((1, 161), jnp.int32)
        spacebyte.forward(config, {}, {"tokens": tokens}, jnp.float32, None)
