"""Cached decoding is the full forward pass: logits, boundaries, text; for any prompt and batch."""

import copy
import dataclasses
import functools
import re
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.config.model import ModelConfig, Patching
from bltjax.configured import batch_logits, initial_params, make_model
from bltjax.data.batches import PatchBatch
from bltjax.family import Model
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.loop import kept_indices, run_loop
from bltjax.inference.decoding.prefill import grow, padded_length, prefill, score_prompts
from bltjax.inference.decoding.sampling import GREEDY, Sampling
from bltjax.inference.decoding.speculation import run_rounds
from bltjax.inference.entropy import contexts
from bltjax.model.blt.config import BLTConfig, CrossConfig, LatentConfig, LocalConfig
from bltjax.model.byte_cnn import ByteCNNConfig, entropy_table, table_entropies
from bltjax.model.byte_lm import ByteLM, ByteLMConfig, entropies_of
from bltjax.text.alphabet import encode
from bltjax.text.ngram_hash import HashConfig
from bltjax.text.patching import force_starts, patch_starts

WINDOW = 8
BYTE_LM = ByteLMConfig(layers=2, width=16, heads=2, hidden=24, window=WINDOW)
BYTE_CNN = ByteCNNConfig(context=2, width=8, layers=1, hidden=16)
BLT_CONFIG = BLTConfig(
    LocalConfig(encoder_layers=2, decoder_layers=2, width=16, heads=2, hidden=24, window=WINDOW),
    CrossConfig(slots=2, heads=2, encoder="last", decoder="all"),
    LatentConfig(layers=2, width=24, heads=4, key_value_heads=2, hidden=32, remat="none"),
    HashConfig(sizes=(3, 5), functions=2, rows=101),
)
TEXT = "Ein kurzer Text.\nA BLT 日本 has é no tokens;\n\nzażółć 🥓 gęślą jaźń, 12 x 34 = 408.\n" * 2
# Entropies of this byte LM: 4.84 to 5.23 nats, a quarter of them above 5.14; of the CNN, 5.31.
MODES = {
    "entropy": (Patching(threshold=5.14), {}),
    "one long patch": (Patching(threshold=9.0), {"encoder": "all"}),
    "longest 3": (Patching(threshold=5.14, max_patch_bytes=3), {"encoder": "none"}),
    "monotonic": (Patching(threshold=0.05, monotonic=True), {"decoder": "first"}),
    "relative": (Patching(threshold=5.05, threshold_add=0.0), {"decoder": "none"}),
    "newline": (Patching(threshold=5.14, newline_reset=True), {"encoder": "all"}),
    "whole": (Patching(threshold=5.1, whole_characters=True, max_patch_bytes=5), {}),
    "space": (Patching(mode="space"), {"slots": 1}),
    "static": (Patching(mode="static", patch_bytes=5), {}),
    "byte": (Patching(mode="byte", whole_characters=True), {}),
    "cnn": (Patching(threshold=5.31, newline_reset=True), {}),
}


@functools.cache
def random_params(config, seed=0):
    """Like fresh parameters, but with uneven norms, and without compiling an initialiser."""
    random = np.random.default_rng(seed)
    model = make_model(config, 2, jnp.float32, None)
    shapes = jax.eval_shape(lambda key: initial_params(model.config, key), jax.random.key(0))

    def draw(path, leaf):
        if "norm" in path[-1].key:
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (random.standard_normal(leaf.shape) * 0.25).astype(np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


@functools.cache
def made(mode: str, window: int = WINDOW, **more) -> tuple[Decoder, BLTConfig, Patching, Model]:
    patching, cross = MODES[mode]
    config = dataclasses.replace(
        BLT_CONFIG,
        local=dataclasses.replace(BLT_CONFIG.local, window=window),
        cross=dataclasses.replace(BLT_CONFIG.cross, **cross),
    )
    scorer = BYTE_CNN if mode == "cnn" else dataclasses.replace(BYTE_LM, window=window)
    byte_lm = Model(ModelConfig(scorer), random_params(scorer, 1))
    settings = ModelConfig(config, patching, compute_dtype="float32")
    model = Model(settings, random_params(config), byte_lm)
    return Decoder(model, **more), config, patching, byte_lm


def full_forward(mode: str, texts: list[bytes], window: int = WINDOW):
    """For each text the logits of the whole model, [len + 1, V], and its starts, [len + 2]."""
    _, config, patching, byte_lm = made(mode, window)
    length = max(map(len, texts)) + 1
    bytes_BN = np.zeros((len(texts), length), np.int32)
    contexts_BN = np.zeros((len(texts), length), np.int32)
    starts_BN1 = np.zeros((len(texts), length + 1), bool)
    for row, text in enumerate(texts):
        ids = encode(text, eos=False)
        bytes_BN[row, : len(ids)] = ids
        contexts_BN[row, : len(ids)] = contexts(ids, patching.newline_reset)
    if mode == "cnn":
        table = entropy_table(byte_lm.config.model, byte_lm.params)
        entropies_BN = table_entropies(table, bytes_BN, contexts_BN)
    else:
        score = jax.jit(ByteLM(byte_lm.config.model).apply)
        scored, _ = score({"params": byte_lm.params}, bytes_BN, contexts_BN)
        entropies_BN = np.asarray(entropies_of(scored))
    near = 9.0
    for row, text in enumerate(texts):
        size = len(text) + 1
        starts_N1 = patch_starts(patching, bytes_BN[row, :size], entropies_BN[row, :size])
        starts_BN1[row, : size + 1] = force_starts(starts_N1)
        near = min(near, abs(entropies_BN[row, :size] - patching.threshold).min())
    documents_BN = (np.arange(length) <= np.array([[len(text)] for text in texts])).astype(np.int32)
    model = make_model(config, length, jnp.float32, None)
    batch = PatchBatch(bytes_BN, documents_BN, starts_BN1)
    logits_BNV = jax.jit(lambda params, batch: batch_logits(model, params, batch))(
        random_params(config), batch
    )
    return np.asarray(logits_BNV), starts_BN1, near


def followed(decoder: Decoder, texts: list[bytes], prompts: list[int], count: int):
    """Cached logits [count + 1, B, V] and starts [count + 1, B] from each prompt's end on, with
    the bytes of the texts instead of sampled ones."""
    model = decoder.model
    memory = decoder.memory(
        [encode(t[:n], eos=False) for t, n in zip(texts, prompts, strict=True)], 4 * count
    )
    memory = model.grown(memory, memory.latent[0].k_BJTC.shape[2], 256)
    ids = np.stack(
        [encode(t, eos=False)[n + 1 : n + 1 + count] for t, n in zip(texts, prompts, strict=True)],
        axis=1,
    )
    all_B = jnp.ones(len(texts), bool)

    def step(memory, id_B, params):
        memory = model.close(params, memory, memory.closes_B)
        logits_BV, memory = model.predict(params, memory)
        opens_B = memory.opens_B
        return model.advance(params, memory, id_B, all_B), (logits_BV, opens_B)

    @jax.jit
    def follow(params, memory, ids):
        return jax.lax.scan(lambda memory, id_B: step(memory, id_B, params), memory, ids)

    memory, (logits, opens) = follow(decoder.params, memory, ids)
    return np.asarray(logits), np.asarray(opens), memory


SLOW = (
    "one long patch", "monotonic", "whole", "space", "static", "byte", "newline", "relative",
    "longest 3",
)  # fmt: skip


def check_cached_equals_full(mode, whole: bytes, prompts: list[int], count: int, window=WINDOW):
    decoder, *_ = made(mode, window)
    texts = [whole[row : row + n + count] for row, n in enumerate(prompts)]
    expected, starts, near = full_forward(mode, texts, window)
    logits, opens, memory = followed(decoder, texts, prompts, count)
    for row, n in enumerate(prompts):
        np.testing.assert_array_equal(opens[:, row], starts[row, n + 1 : n + 1 + count])
        np.testing.assert_allclose(logits[:, row], expected[row, n : n + count], atol=1e-4, rtol=0)
        # One latent step per complete patch, and no others.
        whole_patches = starts[row, : n + count + 2].sum() - 1 - memory.closes_B[row]
        assert memory.patches_B[row] == whole_patches
    assert near > 1e-6
    return starts


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in MODES]
)
def test_cached_equals_full(mode):
    """For prompts of 0 to 3 windows, including ring-buffer wraparound."""
    check_cached_equals_full(mode, TEXT.encode(), [0, 1, 2, 7, 8, 9, 16, 24], 40)


@pytest.mark.slow
def test_cached_equals_full_in_wide_windows():
    """The same with windows of 512, over more than two of them, in hundreds of patches."""
    text, prompts, count = "".join(topics.values()).encode(), [0, 511, 512, 1536], 1100
    starts = check_cached_equals_full("entropy", text, prompts, count, window=512)
    assert starts[3, : 1536 + count].sum() > 300


def written(decoder: Decoder, prompts, **settings):
    """By row: text, log-probabilities, entropies, whether each byte opens a patch, why it ended."""
    pieces = [[] for _ in prompts]
    for piece in decoder.generate(prompts, **settings):
        pieces[piece.row].append(piece)
    return [
        (
            b"".join(piece.text for piece in row),
            *(np.concatenate([piece[i] for piece in row]) for i in (2, 3, 4)),
            row[-1].finish_reason,
        )
        for row in pieces
    ]


PROMPTS = [TEXT[:n].encode() for n in (0, 1, 3, 8, 9, 20, 40, 60)]
RANDOM = Sampling(temperature=0.7, top_k=200, top_p=0.95, min_p=0.001, repetition_penalty=1.1)


@pytest.mark.slow
def test_rows_do_not_depend_on_each_other():
    """A batch of 8 is 8 batches of 1, though its rows wait for each other and end one by one."""
    decoder, *_ = made("entropy")
    settings = {"max_bytes": 50, "sampling": RANDOM}
    together = written(decoder, PROMPTS, seed=5, **settings)
    counts = decoder.counts
    assert counts.bytes == sum(len(row[0]) for row in together) > 200
    assert counts.patches / 8 < counts.latent_runs < 0.8 * counts.patches  # one run for many rows
    for row in (0, 3, 7):
        (alone,) = written(decoder, PROMPTS[row : row + 1], seed=5 + row, **settings)
        assert alone[0] == together[row][0] and alone[4] == together[row][4]
        assert (alone[3] == together[row][3]).all()
        # Products of 8 rows and of one may be summed in another order.
        np.testing.assert_allclose(alone[1], together[row][1], atol=1e-5)
        assert decoder.counts.latent_runs == decoder.counts.patches


def test_one_latent_step_for_each_patch_written():
    decoder, *_ = made("entropy")
    ((text, _, entropies, opens, _),) = written(decoder, ["A BLT"], max_bytes=300, sampling=RANDOM)
    # The last byte may have closed a patch that no byte has read yet; BOS opened one, "A" another.
    assert decoder.counts.latent_runs == decoder.counts.patches == opens.sum()
    _, starts, _ = full_forward("entropy", [b"A BLT" + text])
    np.testing.assert_array_equal(opens, starts[0, 6 : 6 + len(text)])
    assert len(text) > 100 and ((entropies > 5.14) == opens).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one long patch", "byte"])
def test_buffers_grow(mode):
    """A patch of 300 bytes, and 300 patches: each more than the first buffers hold."""
    decoder, *_ = made(mode)
    ((text, log_probs, *_),) = written(decoder, ["x"], max_bytes=300, sampling=RANDOM)
    logits, *_ = full_forward(mode, [b"x" + text])
    expected = jax.nn.log_softmax(logits[0])[np.arange(len(text)) + 1, encode(text)[1:-1]]
    np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_one_program_for_each_bucket():
    """Prompts of 50 lengths are padded to three; their continuation is one program."""
    decoder, *_ = made("newline")
    lengths = range(46, 96)
    buckets = {padded_length(length + 1) for length in lengths}
    assert buckets == {64, 80, 96}
    programs = (score_prompts, prefill, grow, run_loop)
    for program in programs:
        program.clear_cache()
    for length in lengths:
        list(decoder.generate([TEXT.encode()[:length]], max_bytes=1))
    assert [program._cache_size() for program in programs] == [len(buckets)] * 2 + [1, 1]


def test_what_is_not_kept_is_put_nowhere():
    """Nor at its index counted through the whole array."""
    kept_BQ = jnp.array([[True, False, False], [False, True, True]])
    places = kept_indices((2, 5), jnp.array([[2, 3, 4], [2, 3, 4]]), kept_BQ)
    found = jnp.zeros((2, 5)).at[places].set(1.0, mode="drop")
    np.testing.assert_array_equal(found, [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    rows_BQ, columns_BQ = map(np.asarray, places)
    assert (5 * rows_BQ + columns_BQ)[~kept_BQ].min() >= 10


@pytest.mark.parametrize("draft", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_caches_are_written_in_place(draft):
    """A step costs only its reads: the loop's program for one row copies no cache."""
    decoder, *_ = made("entropy", window=24, draft=draft)
    state, asked = decoder.start([TEXT.encode()], 1, GREEDY, 0, [])
    if draft:
        lowered = run_rounds.lower(decoder.model, draft + 1, 32, decoder.params, asked, state)
    else:
        lowered = run_loop.lower(decoder.model, GREEDY.steps(), 32, decoder.params, asked, state)
    memory, text = state.memory, lowered.compile().as_text()
    assert "dynamic-update-slice" in text
    for caches in (memory.scorer, memory.encoder, memory.latent, memory.decoder):
        sides = ",".join(map(str, caches[0].k_BJTC.shape[1:]))  # of one row, which may go unsaid
        assert not re.findall(rf"= f32\[(?:1,)?{sides}\]\S* copy\(.*", text), sides


def test_settings_are_data():
    decoder, *_ = made("entropy")
    list(decoder.generate(["x"], max_bytes=2, sampling=Sampling(temperature=0.5)))
    before = run_loop._cache_size()
    for seed, temperature in enumerate((0.1, 1.0, 2.0)):
        list(
            decoder.generate(
                ["y"], max_bytes=2 + seed, sampling=Sampling(temperature), seed=seed, stop=["ab"]
            )
        )
    assert run_loop._cache_size() == before


@pytest.mark.parametrize(
    "mode",
    [
        "newline",
        pytest.param("relative", marks=pytest.mark.slow),
        pytest.param("longest 3", marks=pytest.mark.slow),
        pytest.param("cnn", marks=pytest.mark.slow),
    ],
)
def test_drafts_change_nothing(mode):
    """Self-speculation generates the same bytes, patches and log-probabilities in fewer passes."""
    (plain, *_), (drafting, *_) = made(mode), made(mode, draft=4)
    prompts = [TEXT.encode(), b"", b"A BLT"]
    expected = written(plain, prompts, max_bytes=90)
    assert plain.counts.passes == plain.counts.bytes + sum(row[4] == "eos" for row in expected)
    found = written(drafting, prompts, max_bytes=90)
    for a, b in zip(expected, found, strict=True):
        assert a[0] == b[0] and a[4] == b[4] and (a[3] == b[3]).all()
        np.testing.assert_allclose(a[1], b[1], atol=1e-4)
        np.testing.assert_allclose(a[2], b[2], atol=1e-4)
    assert drafting.counts.bytes == plain.counts.bytes
    assert drafting.counts.passes < plain.counts.passes
    stop = expected[0][0][40:43]
    assert (
        written(drafting, prompts[:1], max_bytes=90, stop=[stop])[0][0]
        == expected[0][0][: expected[0][0].index(stop)]
    )


def test_drafts_are_refused_with_a_reason():
    decoder, _, _, byte_lm = made("newline", draft=4)
    with pytest.raises(ValueError, match="drafts are verified greedily"):
        decoder.generate(["x"], max_bytes=1, sampling=Sampling(temperature=0.5))
    with pytest.raises(ValueError, match="only a BLT drafts"):
        Decoder(byte_lm, draft=2)
    with pytest.raises(ValueError, match="draft is -1"):
        made("newline", draft=-1)


def poisoned(decoder: Decoder, part: str, name: str, place) -> Decoder:
    """The decoder with one NaN, or a row of them, in a parameter."""

    def change(path, x):
        named = jax.tree_util.keystr(path, simple=True, separator="/")
        return x.at[place].set(jnp.nan) if named == name else x

    changed = copy.copy(decoder)
    tree = jax.tree_util.tree_map_with_path(change, decoder.params[part])
    changed.params = decoder.params | {part: tree}
    return changed


def written_until_error(decoder: Decoder, prompts, **settings) -> tuple[list[bytes], str]:
    """The output of each row before an error ended them all, and the error."""
    texts = [b""] * len(prompts)
    with pytest.raises(FloatingPointError) as raised:
        for piece in decoder.generate(prompts, **settings):
            assert piece.finish_reason == ""
            texts[piece.row] += piece.text
    return texts, str(raised.value)


@pytest.mark.parametrize("draft", [0, 4])
def test_what_is_not_finite_is_an_error_and_no_end_of_a_text(draft):
    """At once, or after the good bytes: the error names prompt, position and parameter."""
    decoder, *_ = made("newline", **({"draft": draft} if draft else {}))
    prompts = [TEXT.encode(), b"", b"A BLT"]
    names = ["first", "second", "third"]
    settings = {"max_bytes": 90, "names": names}
    whole = [row[0] for row in written(decoder, prompts, **settings)]
    # One id's column of the head: an argmax over NaN would take it.
    broken = poisoned(decoder, "model", "decoder/head_EV", (0, 70))
    texts, error = written_until_error(broken, prompts, **settings)
    assert texts == [b""] * 3
    assert error == (
        f"first: logits after its {len(prompts[0])} bytes are not finite; parameter decoder/head_EV"
        " holds 1 value that is not finite"
    )
    # A byte that rows generate, and no prompt has.
    fresh = next(byte for byte in whole[0] if all(byte not in prompt for prompt in prompts))
    broken = poisoned(decoder, "model", "encoder/bytes_VE", 4 + fresh)
    texts, error = written_until_error(broken, prompts, **settings)
    row = names.index(error.partition(":")[0])
    at = whole[row].index(fresh) + 1
    assert texts[row] == whole[row][:at]
    assert f": logits after its {len(prompts[row])} bytes and {at} that were written" in error
    assert "parameter encoder/bytes_VE holds 16 values" in error


def test_entropies_that_are_not_finite_place_no_patches():
    decoder, *_ = made("newline")
    prompts = [b"", b"A BLT"]
    broken = poisoned(decoder, "scorer", "bytes_VE", 4 + ord("L"))
    texts, error = written_until_error(broken, prompts, max_bytes=8)
    assert texts == [b"", b""]
    # A masked value is multiplied by zero, so its NaN may spread to positions just before it.
    assert re.fullmatch(
        r"prompt 2: the entropy after its first [0-4] bytes is not finite; parameter"
        r" byte_lm/bytes_VE holds 16 values that are not finite",
        error,
    )
