"""The BPE Llama: the public implementation's numbers, documents apart, caches, weights."""

import dataclasses
import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobian import jacobian
from made_once import made_once

from bltjax.attention.rope import RopeScalingConfig
from bltjax.config.letters import suffix_axes
from bltjax.config.model import ModelConfig
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.params import flattened
from bltjax.rivals import llama
from bltjax.rivals.decoding.llama import cached_llama
from bltjax.rivals.llama import Llama, LlamaConfig
from bltjax.weights.lazy import leaf_of
from bltjax.weights.released.leftovers import Rotary
from bltjax.weights.released.tensors import tensors_of
from bltjax.weights.rivals.llama import EMBEDDING, HEAD, parts, read_settings, written_settings

# Channels of heads apart from the width, grouped heads, rotary scaling, odd sizes.
CONFIG = LlamaConfig(
    layers=3, width=24, heads=6, key_value_heads=2, channels=10, hidden=36, vocabulary=61,
    rope_theta=1e4, rope_scaling=RopeScalingConfig(positions=16), tied=True,
)  # fmt: skip
UNTIED = dataclasses.replace(CONFIG, tied=False, channels=0, rope_scaling=None)
N = 40


def initial(config: LlamaConfig, scanned: bool = True) -> dict:
    ones = jnp.ones((1, 2), jnp.int32)
    return Llama(config, scanned=scanned).init(jax.random.key(0), ones, ones)["params"]


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(functools.partial(initial, config))
    return {path: leaf.shape for path, leaf in flattened(tree).items()}


@made_once
def params_of(config: LlamaConfig) -> dict:
    """Parameters whose norms are not all 1."""

    def moved(x):
        return x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape))

    return jax.tree.map(moved, jax.jit(functools.partial(initial, config))())


def drawn(rows: int, length: int, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, CONFIG.vocabulary)


def tensors_named(weights: dict[str, np.ndarray]) -> dict:
    return {name: golden.tensor_of(array) for name, array in weights.items()}


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_golden(name, implementation, by_tiles):
    file = golden.read(name)
    config, left, notes = read_settings(file.settings, tensors_named(file.weights), name)
    assert left.keys() == file.weights.keys() and not notes
    params = golden.params_of(file.weights, parts(config.model), shapes_of(config.model))
    arrays = {key: jnp.asarray(value) for key, value in file.inputs.items()}
    assert set(arrays) == set(llama.FORWARD_INPUTS)

    def loss(params):
        out = llama.forward(config, params, arrays, jnp.float32, implementation)
        return out["loss"], out

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert found.keys() == file.expected.keys()
    for key, value in found.items():
        if key == "logits":
            value = value[:, file.positions]
        elif key == "hidden_states":
            value = value[:, :, file.positions]
        np.testing.assert_allclose(
            value, file.expected[key], atol=golden.ABSOLUTE, rtol=0, err_msg=key
        )
    golden.check_gradient_norms(grads, parts(config.model), file.gradient_norms)


def packed(documents: list, offset: int, length: int):
    """A row with an earlier document of `offset` ids before the others, and padding after them."""
    ids = [np.asarray(drawn(1, offset, seed=9)[0]), *documents]
    numbers = np.concatenate([np.full(len(x), n + 1) for n, x in enumerate(ids) if len(x)])
    pad = (0, length - len(numbers))
    return np.pad(np.concatenate(ids), pad), np.pad(numbers, pad)


def test_packed_equals_alone_and_rows_are_apart():
    documents = [np.asarray(drawn(1, size, seed=size)[0]) for size in (11, 1, 14)]
    rows = [packed(documents, offset, N) for offset in (0, 3, 13)]
    rows += [packed([document], 0, N) for document in documents]
    tokens_BN, documents_BN = (jnp.asarray(np.stack(x), jnp.int32) for x in zip(*rows, strict=True))
    module = Llama(CONFIG, implementation="xla")
    logits = np.asarray(
        jax.jit(module.apply)({"params": params_of(CONFIG)}, tokens_BN, documents_BN)[0]
    )
    for row, offset in enumerate((0, 3, 13)):
        begin = offset
        for number, document in enumerate(documents):
            alone = logits[3 + number, : len(document)]
            both = logits[row, begin : begin + len(document)]
            np.testing.assert_allclose(both, alone, atol=1e-5, rtol=0)
            begin += len(document)


def test_nothing_leaks():
    """A logit changes with ids of its own document up to its own, and no other: by the gradient
    with respect to each position's embedding, and by value."""
    numbers_N = np.repeat([1, 2, 0], [9, 11, 4])
    documents_BN = jnp.asarray(np.stack([numbers_N, np.ones_like(numbers_N)]), jnp.int32)
    length = len(numbers_N)
    config = dataclasses.replace(UNTIED, vocabulary=2 * length)
    params = params_of(config)
    ids_BN = jnp.arange(2 * length, dtype=jnp.int32).reshape(2, length)  # an embedding each
    mix_V = jax.random.normal(jax.random.key(1), (2 * length,))

    def mixed(table_VD, ids_BN):
        given = {"params": params | {"tokens_VD": table_VD}}
        return Llama(config).apply(given, ids_BN, documents_BN)[0] @ mix_V

    def influence(table_VD):
        return (jacobian(lambda x: mixed(x, ids_BN).reshape(-1), table_VD) ** 2).sum(-1)

    grid = np.asarray(jax.jit(influence)(params["tokens_VD"])).reshape(2 * length, 2 * length)
    numbers = np.concatenate([numbers_N, np.full(length, 7)])
    allowed = np.tril(numbers[:, None] == numbers[None])
    real = numbers > 0
    assert not grid[real][~allowed[real]].any()
    assert (grid[real][allowed[real]] > 0).mean() > 0.99

    run = jax.jit(mixed)
    before = np.asarray(run(params["tokens_VD"], ids_BN)).ravel()
    for position in (0, 8, 9, 15):
        after = np.asarray(run(params["tokens_VD"], ids_BN.at[0, position].set(40))).ravel()
        assert (after[real & ~allowed[:, position]] == before[real & ~allowed[:, position]]).all()
        assert (after != before)[position]


def test_names_say_their_ranks():
    for config in (CONFIG, UNTIED):
        for path, shape in shapes_of(config).items():
            assert len(suffix_axes(path)) == len(shape), path
        assert ("head_DV" in shapes_of(config)) == (not config.tied)
    shapes = shapes_of(CONFIG)
    assert shapes["blocks/q_LDHC"] == (3, 24, 6, 10) and shapes["blocks/o_LHCD"] == (3, 6, 10, 24)


@pytest.mark.parametrize("remat", ["products", "full"])
def test_scan_equals_loop_and_remat_equals_none(remat):
    tokens_BN, documents_BN = drawn(2, 12), jnp.ones((2, 12), jnp.int32)

    def outcome(config, scanned):
        def loss(params):
            given = params if scanned else unscanned(params)
            module = Llama(config, scanned=scanned)
            return (module.apply({"params": given}, tokens_BN, documents_BN)[0] ** 2).mean()

        return jax.value_and_grad(loss)(params_of(CONFIG))

    @jax.jit
    def both():
        return outcome(CONFIG, False), outcome(dataclasses.replace(CONFIG, remat=remat), True)

    plain, other = both()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, other)


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_cached_equals_full(config):
    """Rows of three lengths, through two doublings of the cache; waiting rows don't change."""
    length_B, prompt, total = np.array([3, 6, 1]), 6, 26
    tokens_BN = drawn(3, total)
    params = params_of(config)
    module = Llama(config)
    full = np.asarray(
        jax.jit(module.apply)({"params": params}, tokens_BN, jnp.ones_like(tokens_BN))[0]
    )
    cached = cached_llama(ModelConfig(config), None, jnp.float32)
    assert (
        cached.grows
        and not cached.patched
        and cached == cached_llama(ModelConfig(config), None, jnp.float32)
    )
    weights = cached.prepared(params, None)
    prefill, advance = jax.jit(cached.prefill), jax.jit(cached.advance)
    memory = prefill(weights, tokens_BN[:, :prompt], jnp.asarray(length_B))
    count_B = length_B.copy()
    grown = 0
    for step in range(100):
        logits, memory = cached.predict(weights, memory)
        at = (np.arange(3), count_B - 1)
        np.testing.assert_allclose(logits, full[at], atol=2e-5, rtol=0)
        np.testing.assert_array_equal(memory.count_B, count_B)
        go_B = (count_B < total) & ((step + np.arange(3)) % 3 > 0)  # each waits in turn
        if not (count_B < total).any():
            break
        full_B1 = np.asarray(cached.full(memory))
        assert (full_B1[:, 0] == (count_B + 1 > cached.capacity(memory)[0])).all()
        if (full_B1[:, 0] & go_B).any():
            memory = cached.grown(memory, *cached.needs(2 * cached.capacity(memory)[0]))
            grown += 1
        id_B = tokens_BN[np.arange(3), np.minimum(count_B, total - 1)]
        before = memory
        memory = advance(weights, memory, id_B, jnp.asarray(go_B))
        for row in np.flatnonzero(~go_B):
            held = [[x[row] for x in jax.tree.leaves(one)] for one in (before, memory)]
            for old, new in zip(*held, strict=True):
                np.testing.assert_array_equal(old, new)
        count_B = count_B + go_B
    assert grown == 3 and (count_B == total).all()


def test_flops():
    """By hand; and the figures of the specification: bytes of a row over bytes per token."""
    for config, inner, shared in ((CONFIG, 60, 20), (UNTIED, 24, 8)):
        token = 2 * 24 * (2 * inner + 2 * shared + 3 * 36)
        row = 3 * (7 * token + 4 * inner * (1 + 2 + 3 + 4 + 5 + 6 + 7)) + 7 * 2 * 24 * 61
        assert llama.forward_flops(config, 7, 0) == row
        assert llama.recomputed_flops(config, 7, 0) == 3 * 2 * inner * 28
        full = dataclasses.replace(config, remat="full")
        again = row - 7 * 2 * 24 * 61 + 3 * (2 * inner * 28 - 7 * 2 * 24 * 36)
        assert llama.recomputed_flops(full, 7, 0) == again
    small = LlamaConfig(
        layers=6, width=256, heads=4, key_value_heads=4, hidden=768, vocabulary=8000
    )
    assert round(llama.forward_flops(small, 512, 0) / 512 / 4.16 / 1e6, 1) == 3.8
    paper = 4 * 256 * 513 / 2 + 8 * 256**2 + 16 * 256**2
    assert llama.paper_flops(small, 512, 0) == 6 * paper + 2 * 256 * 8000


@pytest.mark.parametrize(
    ("total", "settings"),
    [
        (8_030_261_248, {}),
        (6_738_415_616, {"key_value_heads": 32, "hidden": 11008, "vocabulary": 32000}),
    ],
)
def test_public_sizes(total, settings):
    shapes = shapes_of(LlamaConfig(**settings))
    assert sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()) == total


def their_tensors(config: LlamaConfig) -> dict[str, np.ndarray]:
    leaves = {path: leaf_of(np.asarray(x)) for path, x in flattened(params_of(config)).items()}
    tensors = tensors_of(leaves, parts(config), {})
    return {name: tensor.all() for name, tensor in tensors.items()}


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_weights_and_settings_there_and_back(config):
    weights, limits = their_tensors(config), {"max_bytes": 96, "max_patches": 96}
    written = json.loads(json.dumps(written_settings(ModelConfig(config, **limits), "float32")))
    read, left, notes = read_settings(written, tensors_named(weights), "config.json")
    assert read == ModelConfig(config, **limits) and not notes
    ours = golden.params_of(
        {name: left[name].all() for name in left}, parts(read.model), shapes_of(config)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, dict(params_of(config)))
    for name, array in golden.public(ours, parts(read.model)).items():
        np.testing.assert_array_equal(array, weights[name])


def test_old_spellings():
    values = written_settings(ModelConfig(CONFIG, max_bytes=96, max_patches=96), "float32")
    rope = values.pop("rope_parameters")
    old = values | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    rope["type"] = rope.pop("rope_type")
    assert read_settings(old, tensors_named(their_tensors(CONFIG)), "old")[0].model == CONFIG
    plain = written_settings(ModelConfig(UNTIED), "float32")
    del plain["head_dim"]
    assert read_settings(plain, tensors_named(their_tensors(UNTIED)), "old")[0].model == UNTIED


def test_heads_and_copies():
    values, weights = written_settings(ModelConfig(CONFIG), "float32"), their_tensors(CONFIG)
    rates = Rotary(10, CONFIG.rope_theta, CONFIG.rope_scaling).rates.astype(np.float32)
    more = {HEAD: weights[EMBEDDING], "model.layers.1.self_attn.rotary_emb.inv_freq": rates}
    config, left, notes = read_settings(values, tensors_named(weights | more), "x")
    assert config.model == CONFIG and left.keys() == weights.keys()
    assert "inv_freq left out" in notes[0] and "lm_head.weight left out" in notes[1]

    other = weights | {HEAD: weights[EMBEDDING][::-1].copy()}
    config, left, notes = read_settings(values, tensors_named(other), "x")
    assert not config.model.tied and left.keys() == other.keys()
    assert "lm_head.weight differs from model.embed_tokens.weight" in notes[0]

    wrapped = {f"module.{name}": array for name, array in weights.items()}
    assert read_settings(values, tensors_named(wrapped), "x")[1].keys() == weights.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 60}, r"vocab_size is 60, but model.embed_tokens.weight .*\(61, 24\)"),
        ({"tie_word_embeddings": False}, r"has no lm_head.weight of shape \(61, 24\)"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported: 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; supported: False"),
        ({"num_experts": 8}, "a field 'num_experts' .8. that is not known"),
        ({"num_attention_heads": 5}, r"key_value_heads \(2\) must divide llama.heads \(5\)"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0|llama.heads is 0, not > 0"),
        ({"head_dim": 5}, r"2 \(2\) must divide llama channels per head \(5\)"),
        ({"num_hidden_layers": 10**6}, "its config asks for 1000000 layers"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; supported"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not float"),
    ],
)
def test_settings_refused(changes, message):
    values, weights = written_settings(ModelConfig(CONFIG), "float32"), their_tensors(CONFIG)
    with pytest.raises(ValueError, match=message) as error:
        read_settings(values | changes, tensors_named(weights), "config.json")
    assert str(error.value).startswith("config.json")


def test_own_settings_refused():
    with pytest.raises(ValueError, match=r"llama.heads \(5\) must divide llama.width \(24\)"):
        dataclasses.replace(UNTIED, heads=5, key_value_heads=5)
    with pytest.raises(ValueError, match=r"llama.channels is -2, not >= 0"):
        dataclasses.replace(UNTIED, channels=-2)
    with pytest.raises(ValueError, match=r"llama.remat is 'some', not one of"):
        dataclasses.replace(UNTIED, remat="some")


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_as_transformers(config, tmp_path):
    """The library itself reads what we write, and computes the same."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import save_file

    model_config = ModelConfig(config, max_bytes=96, max_patches=96)
    values = written_settings(model_config, "float32")
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    weights = {name: np.ascontiguousarray(x) for name, x in their_tensors(config).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens_BN = np.asarray(drawn(2, 33))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens_BN).long(), output_hidden_states=True)
    arrays = {"tokens": jnp.asarray(tokens_BN)}
    ours = llama.forward(model_config, params_of(config), arrays, jnp.float32, "xla")
    np.testing.assert_allclose(ours["logits"], expected.logits, atol=1e-4, rtol=0)
    for layer, states in enumerate(expected.hidden_states):
        np.testing.assert_allclose(ours["hidden_states"][:, layer], states, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    read, _, notes = read_settings(saved, tensors_named(weights), "again")
    assert read == model_config and not notes
