"""ByT5: golden vectors, invariants of packed pairs, decoding, FLOPs, and public weights."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobian import jacobian
from made_once import made_once

from bltjax.config.letters import suffix_axes
from bltjax.config.model import REMAT, ModelConfig
from bltjax.data.objectives.spans import corrupted, prefix
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.params import flattened
from bltjax.rivals.byt5 import (
    FORWARD_INPUTS,
    ByT5,
    ByT5Config,
    ObjectiveConfig,
    forward,
    forward_flops,
    paper_flops,
    recomputed_flops,
    row_sizes,
)
from bltjax.rivals.decoding.byt5 import cached_byt5
from bltjax.text.alphabet import ALPHABETS, encode
from bltjax.text.sentinels import START, sentinel
from bltjax.weights.rivals import byt5 as weights

SMALL = ByT5Config(
    encoder_layers=2, decoder_layers=2, width=16, heads=3, channels=4, hidden=20, buckets=8,
    farthest=12,
)  # fmt: skip
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def read():
    """The golden file, our settings and parameters."""
    file = golden.read("byt5")
    tensors = {name: golden.tensor_of(array) for name, array in file.weights.items()}
    config, tensors, notes = weights.read_settings(file.settings, tensors, "golden")
    assert tensors.keys() == file.weights.keys() and len(notes) == 1
    shapes = shapes_of(config.model)
    return file, config, golden.params_of(file.weights, weights.parts(config.model), shapes)


@functools.cache
def shapes_of(config):
    x = jnp.ones((1, 2), jnp.int32)
    made = jax.eval_shape(lambda key: ByT5(config).init(key, x, x, x, x), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flattened(made["params"]).items()}


@made_once
def params_of(config, seed=0):
    x = jnp.ones((1, 2), jnp.int32)
    made = jax.jit(ByT5(config).init, compiler_options=FAST)(jax.random.key(seed), x, x, x, x)
    return made["params"]


@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_golden(implementation, monkeypatch):
    """Distances beyond the farthest, padding of both rows, and every gradient."""
    if implementation == "xla":
        monkeypatch.setattr("bltjax.attention.biased.SHORT", 0)
    file, config, params = read()
    assert set(FORWARD_INPUTS) == file.inputs.keys()

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params):
        def loss(params):
            out = forward(config, params, file.inputs, jnp.float32, implementation)
            return out["loss"], out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = run(params)
    assert out.keys() == file.expected.keys()
    for name, expected in file.expected.items():
        found = np.asarray(out[name])
        if name in ("decoder_out", "logits"):
            found = found[:, file.positions]
        if name == "decoder_bias_last_row":
            found = found[:, file.positions]
        np.testing.assert_allclose(found, expected, atol=golden.ABSOLUTE, err_msg=name)
    golden.check_gradient_norms(grads, weights.parts(config.model), file.gradient_norms)


TEXTS = ("the patch begins", "where", "the next byte is hard to guess", "x")


@functools.cache
def pairs():
    """An example of each text: masked spans of some, prefixes of others."""
    rng = np.random.default_rng(0)
    ids = [encode(text, bos=False, eos=False) for text in TEXTS]
    return [
        prefix(x, rng) if number % 2 else corrupted(x, rng, noise=0.3, mean_span=3)
        for number, x in enumerate(ids)
    ]


def row(numbers, encoder=80, decoder=60, lead=0):
    """One row of pairs: encoder ids and documents, decoder ids and documents.

    lead: size of a document of noise before them, on both sides.
    """
    rng = np.random.default_rng(lead)
    noise = [rng.integers(4, 200, lead)] if lead else []
    sides = (
        [*noise, *(pairs()[number].encoder_ids for number in numbers)],
        [*noise, *(pairs()[number].decoder_ids for number in numbers)],
    )
    found = []
    for parts, size in zip(sides, (encoder, decoder), strict=True):
        documents = [np.full(len(part), number) for number, part in enumerate(parts, start=1)]
        for arrays in (parts, documents):
            whole = np.concatenate(arrays).astype(np.int32)
            found.append(np.pad(whole, (0, size - len(whole))))
    return found


def logits_of(rows, implementation="dense"):
    batch = [jnp.asarray(np.stack(part)) for part in zip(*rows, strict=True)]
    model = ByT5(SMALL, implementation=implementation)
    return np.asarray(jax.jit(model.apply)({"params": params_of(SMALL)}, *batch)[0])


@pytest.mark.parametrize("implementation", ["dense", "xla", "pallas_tpu"])
def test_packed_equals_alone(implementation, monkeypatch):
    """At several offsets in both rows, and beside other rows; kernels give way to xla."""
    if implementation == "xla":
        monkeypatch.setattr("bltjax.attention.biased.SHORT", 0)
    every = range(len(TEXTS))
    rows = [row(every), row(every[::-1]), row([2, 0], lead=7), *(row([n]) for n in every)]
    found = logits_of(rows, implementation)
    alone = [found[3 + n, : len(pairs()[n].targets)] for n in every]
    for packed, numbers, begin in (
        (found[0], every, 0),
        (found[1], every[::-1], 0),
        (found[2], [2, 0], 7),
    ):
        for n in numbers:
            end = begin + len(alone[n])
            np.testing.assert_allclose(packed[begin:end], alone[n], atol=1e-5, err_msg=str(n))
            begin = end
    # Rows are apart, to the last bit.
    rows[1] = row([3])
    assert (logits_of(rows, implementation)[[0, 2]] == found[[0, 2]]).all()


def test_what_a_logit_depends_on():
    """By gradient: of its own document, the whole encoder and the decoder up to its position."""
    encoder_documents = np.repeat([1, 2, 3, 0], [20, 1, 15, 4])
    documents = np.repeat([1, 2, 3, 0], [9, 12, 4, 5])
    T, N = len(encoder_documents), len(documents)
    # Every position has an id, and so an embedding, of its own.
    given = [np.arange(T), encoder_documents, np.arange(T, T + N), documents]
    given = [jnp.asarray(x, jnp.int32)[None] for x in given]

    @functools.partial(jax.jit, compiler_options=FAST)
    def influence(bytes_VD):
        mix_NV = jax.random.normal(jax.random.key(1), (N, 260))

        def mixed(bytes_VD):
            params = params_of(SMALL) | {"bytes_VD": bytes_VD}
            logits = ByT5(SMALL).apply({"params": params}, *given)[0][0]
            return (logits * mix_NV).sum(-1)

        return (jacobian(mixed, bytes_VD) ** 2).sum(-1)

    found = np.asarray(influence(params_of(SMALL)["bytes_VD"]))[:, : T + N] > 0
    same = documents[:, None] == np.concatenate([encoder_documents, documents])[None]
    allowed = same & np.concatenate([np.ones((N, T), bool), np.tri(N, dtype=bool)], axis=1)
    real = documents > 0
    assert (found[real] == allowed[real]).all()


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_are_those_of_the_letters(tied):
    shapes = shapes_of(dataclasses.replace(SMALL, tied=tied))
    assert ("head_DV" in shapes) != tied
    for path, shape in shapes.items():
        assert len(suffix_axes(path)) == len(shape), path
    assert shapes["decoder/blocks/cross/o_LHCD"] == (2, 3, 4, 16)
    assert shapes["encoder/distances_WH"] == (8, 3)


def test_initial_values():
    """Queries are small, since scores have no factor; the rest has variance 1 / inputs."""
    params = flattened(params_of(dataclasses.replace(SMALL, width=64, hidden=80), seed=1))
    for path, sigma in (
        ("bytes_VD", 1),
        ("head_DV", 64**-0.5),  # published: 1
        ("encoder/blocks/attention/q_LDHC", (64 * 4) ** -0.5),
        ("decoder/blocks/cross/k_LDHC", 64**-0.5),
        ("decoder/blocks/cross/o_LHCD", 12**-0.5),
        ("decoder/blocks/down_LFD", 80**-0.5),
    ):
        np.testing.assert_allclose(np.std(params[path]), sigma, rtol=0.08, err_msg=path)


def test_loop_and_rematerialised():
    """The logits of a loop over layers are the scan's, and recomputing changes no gradient."""
    batch = [jnp.asarray(x)[None] for x in row(range(len(TEXTS)))]
    params = params_of(SMALL)
    apart = {k: unscanned(x) if isinstance(x, dict) else x for k, x in params.items()}
    assert apart["decoder"]["block_1"]["cross"]["q_DHC"].shape == (16, 3, 4)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params, apart):
        def loss(params, remat):
            config = dataclasses.replace(SMALL, remat=remat)
            logits = ByT5(config).apply({"params": params}, *batch)[0]
            return (logits**2).mean(), logits

        looped = ByT5(SMALL, scanned=False).apply({"params": apart}, *batch)[0]
        return looped, [jax.grad(loss, has_aux=True)(params, remat) for remat in REMAT]

    looped, ((plain, logits), *others) = run(params, apart)
    np.testing.assert_allclose(looped, logits, atol=1e-5)
    for grads, _ in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, grads
        )


@pytest.mark.parametrize(("alphabet", "steps"), [("blt", 40), ("byt5", 5)])
def test_cached_equals_full(alphabet, steps):
    """Rows with prompts of other lengths, that pause, past two doublings of the buffer; with the
    ids of released weights, no BOS comes before the prompt."""
    config = dataclasses.replace(SMALL, alphabet=alphabet)
    kind, params = ALPHABETS[alphabet], params_of(config)
    opened = int(kind.bos is not None)
    rng = np.random.default_rng(0)
    prompts = [kind.offset + rng.integers(0, 128, size) for size in (0, 4, 9)]
    written = kind.offset + rng.integers(0, 128, (3, steps))
    mark, width = sentinel(0, kind), max(map(len, prompts)) + opened
    bytes_BN = np.zeros((3, width), np.int32)
    encoder, documents = np.zeros((2, 3, width + 2), np.int32)
    for number, prompt in enumerate(prompts):
        bytes_BN[number, : opened + len(prompt)] = [*[kind.bos] * opened, *prompt]
        encoder[number, : len(prompt) + 2] = [*prompt, mark, kind.eos]
        documents[number, : len(prompt) + 2] = 1
    decoder = np.concatenate([np.tile([[START, mark]], (3, 1)), written], axis=1).astype(np.int32)
    given = (jnp.asarray(x) for x in (encoder, documents, decoder, np.ones_like(decoder)))
    jit = functools.partial(jax.jit, compiler_options=FAST)
    full = np.asarray(jit(ByT5(config).apply)({"params": params}, *given)[0])[:, 1:]

    decoding = cached_byt5(ModelConfig(config), None, jnp.float32)
    assert hash(decoding) == hash(cached_byt5(ModelConfig(config), None, jnp.float32))
    weights_, length_B = (
        decoding.prepared(params, None),
        jnp.array([len(p) + opened for p in prompts]),
    )
    memory = jit(decoding.prefill)(weights_, jnp.asarray(bytes_BN), length_B)
    advance = jit(decoding.advance)
    assert decoding.capacity(memory) == decoding.needs(width) == (width + 2,)
    made, capacities = np.zeros(3, int), set()
    while (made < steps).any():
        if np.asarray(decoding.full(memory)).any():
            memory = decoding.grown(memory, *(2 * size for size in decoding.capacity(memory)))
        capacities.add(decoding.capacity(memory))
        logits, memory = decoding.predict(weights_, memory)
        np.testing.assert_allclose(logits, full[np.arange(3), made], atol=2e-5)
        go = (made < steps) & (rng.random(3) < 0.8)
        id_B = jnp.asarray(written[np.arange(3), np.minimum(made, steps - 1)], jnp.int32)
        memory = advance(weights_, memory, id_B, jnp.asarray(go))
        made += go
        assert (memory.count_B == length_B + made).all()
    np.testing.assert_allclose(memory.logits_BV, full[:, -1], atol=2e-5)
    assert len(capacities) == (3 if steps == 40 else 1)
    assert decoding.full(memory, ahead=1).tolist() == [[False]] * 3
    assert decoding.full(memory, ahead=decoding.capacity(memory)[0]).all()


def test_flops():
    """The published small one's 422 MFLOP a text byte; a tiny one by hand; what is recomputed."""
    small = ByT5Config(alphabet="byt5")
    assert round(forward_flops(small, 1193, 0) / 1193 / 1e6) == 422
    assert paper_flops(small, 1193, 0) == forward_flops(small, 1193, 0) / 1193
    quick = ByT5Config(6, 2, width=128, heads=4, channels=32, hidden=256, alphabet="byt5")
    assert round(forward_flops(quick, 1193, 0) / 1193 / 1e5) == 48
    config = ByT5Config(
        1, 1, width=2, heads=1, channels=3, hidden=5, objective=ObjectiveConfig("prefix")
    )
    encoder = decoder = 14  # positions, for two windows of 10 bytes, split in places that sum to 10
    assert row_sizes(config, 10) == (encoder, decoder)
    attention, forward_ = 2 * 3, 2 * 2 * 3 * 5
    a_layer = encoder * (4 * 2 * attention + forward_) + 2 * encoder**2 * attention
    queries = decoder * (2 * 2 * attention * 2 + 2 * 2 * attention + forward_)
    expected = a_layer + decoder * (6 * 2 * attention + forward_) + 2 * 2 * attention * encoder
    seen = decoder * (decoder + 1) // 2 + decoder * encoder
    expected += 2 * attention * seen + decoder * 2 * 2 * 260
    assert queries == decoder * (6 * 2 * attention + forward_)
    assert forward_flops(config, 10, 0) == expected
    assert paper_flops(config, 10, 0) == expected / 20
    scores = (encoder**2 + seen) * attention
    assert recomputed_flops(config, 10, 0) == scores
    full = dataclasses.replace(config, remat="full")
    head, last = decoder * 2 * 2 * 260, 2 * 2 * 5 * (encoder + decoder)
    assert recomputed_flops(full, 10, 0) == scores + expected - head - last


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((12, 4, 1472, 6, 64, 3584), 299_637_760),
        ((18, 6, 1536, 12, 64, 3968), 581_653_248),
        ((36, 12, 1536, 16, 64, 3840), 1_228_183_552),
        ((36, 12, 2560, 32, 64, 6720), 3_737_801_728),
        ((36, 12, 4672, 64, 64, 12352), 12_906_899_328),
    ],
)
def test_released_sizes(sizes, count):
    shapes = shapes_of(ByT5Config(*sizes, alphabet="byt5"))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def test_settings_are_refused():
    for changes, message in (
        ({"buckets": 6}, r"buckets \(6\) must be a multiple of 4"),
        ({"farthest": 4}, r"farthest \(4\) must exceed byt5.buckets / 2 \(4\)"),
        ({"heads": 0}, "heads is 0"),
        ({"alphabet": "spacebyte"}, "byt5.alphabet is 'spacebyte', not one of blt, byt5"),
        ({"remat": "some"}, "byt5.remat is 'some'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)
    for changes, message in (
        ({"kind": "causal"}, "objective.kind is 'causal', not one of spans, prefix"),
        ({"noise": 1.0}, r"objective.noise is 1.0, not in \(0, 1\)"),
        ({"mean_span": 0.5}, "objective.mean_span is 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ObjectiveConfig(**changes)
    with pytest.raises(ValueError, match="dense or xla, not 'fast'"):
        logits_of([row([0])], "fast")


def test_public_weights_there_and_back():
    """Every tensor bit for bit, and the settings; copies and the relic are left out."""
    file, config, params = read()
    again = golden.public(params, weights.parts(config.model))
    assert again.keys() == file.weights.keys()
    for name, array in file.weights.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    written = weights.written_settings(config, "float32")
    unlike = {name for name in file.settings if written.get(name) != file.settings[name]}
    assert (
        not unlike & weights.SIZES.keys() and not unlike & weights.REQUIRED.keys() & written.keys()
    )
    assert read_with({}, written)[0] == config


def read_with(more: dict, settings: dict, drop=()):
    """Our settings, the names of tensors that are left, and notes."""
    file, _, _ = read()
    arrays = {name: x for name, x in (file.weights | more).items() if name not in drop}
    tensors = {name: golden.tensor_of(x) for name, x in arrays.items()}
    config, tensors, notes = weights.read_settings(settings, tensors, "config.json")
    return config, tensors.keys(), notes


def test_tying_is_decided_by_the_tensors():
    file, config, _ = read()
    tied = dataclasses.replace(config, model=dataclasses.replace(config.model, tied=True))
    asked = file.settings | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    head, embedding = "lm_head.weight", file.weights["shared.weight"]
    found, left, notes = read_with({}, asked)
    assert found == config and head in left and "untied, though" in notes[0]
    found, left, notes = read_with({head: embedding}, asked)
    assert found == tied and head not in left and "once more" in notes[0]
    found, left, _ = read_with({}, asked, drop=[head])
    assert found == tied and {part.name for part in weights.parts(tied.model)} == left
    found, left, _ = read_with({head: embedding}, file.settings)
    assert found == config and head in left
    with pytest.raises(ValueError, match=r"tie_word_embeddings is False, and there is no lm_head"):
        read_with({}, file.settings, drop=[head])


def test_copies_and_relics():
    file, config, _ = read()
    copies = {name: file.weights["shared.weight"] for name in weights.COPIES}
    relic = {weights.RELIC: np.ones((32, 3), np.float32)}
    found, left, notes = read_with(copies | relic, file.settings)
    assert found == config and left == file.weights.keys() and len(notes) == 4
    other = {weights.COPIES[0]: file.weights["shared.weight"] + 1}
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight is not a copy of shared"):
        read_with(other, file.settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; supported: 'gated-gelu'"),
        ({"vocab_size": 250112}, "vocab_size is 250112; supported: 384"),
        ({"scale_decoder_outputs": True}, r"scaled by d_model\^-0.5"),
        ({"scale_decoder_outputs": None, "tie_word_embeddings": True}, r"scaled by d_model\^-0.5"),
        ({"decoder_start_token_id": 2}, "decoder_start_token_id is 2"),
        ({"num_heads": 0}, "heads is 0"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small', not float"),
        ({"rotary": 1}, r"has a field 'rotary' \(1\) that is not known"),
    ],
)
def test_public_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        read_with({}, read()[0].settings | changes)


def test_our_ids_are_not_written_as_theirs():
    with pytest.raises(ValueError, match=r"byt5\.alphabet, unless it is byt5"):
        weights.written_settings(ModelConfig(SMALL), "float32")


@pytest.mark.slow
def test_transformers_live(tmp_path):
    """A model that transformers makes, saves and runs: settings, tying and logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = read()[0].settings | {"num_layers": 2, "d_kv": 12, "num_heads": 2}
    settings |= {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 50}
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).eval()
    with torch.no_grad():
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(384, 32))
    theirs.save_pretrained(tmp_path)
    saved = theirs.config.to_dict()
    state = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    tensors = {name: golden.tensor_of(x) for name, x in state.items()}
    config, tensors, _ = weights.read_settings(saved, tensors, "config.json")
    assert not config.model.tied and (config.model.buckets, config.model.channels) == (16, 12)
    rng = np.random.default_rng(0)
    inputs = {
        "input_ids": rng.integers(3, 259, (2, 90)),
        "attention_mask": (np.arange(90)[None] < np.array([[90], [71]])).astype(int),
        "labels": np.where(np.arange(70)[None] < np.array([[60], [70]]), 77, -100),
    }
    parts = weights.parts(config.model)
    params = golden.params_of({k: state[k] for k in tensors}, parts, shapes_of(config.model))
    run = jax.jit(functools.partial(forward, config, dtype=jnp.float32, implementation="xla"))
    found = run(params, {name: jnp.asarray(x, jnp.int32) for name, x in inputs.items()})
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x) for name, x in inputs.items()})
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["loss"], expected.loss.item(), rtol=1e-5)
