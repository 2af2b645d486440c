"""MambaByte: its public vectors, documents, decoding, layouts."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_once import made_once

from bltjax.config.letters import suffix_axes
from bltjax.config.model import ModelConfig
from bltjax.model.blt.latent_transformer import unscanned
from bltjax.model.params import flattened
from bltjax.rivals.decoding.mambabyte import cached_mambabyte
from bltjax.rivals.mambabyte import (
    FORWARD_INPUTS,
    MambaByte,
    MambaByteConfig,
    forward,
    forward_flops,
    paper_flops,
    recomputed_flops,
    scan_implementation,
)
from bltjax.weights.lazy import leaf_of
from bltjax.weights.released.tensors import tensors_of
from bltjax.weights.rivals import mambabyte as layout

TINY = MambaByteConfig(layers=2, width=16, states=4, tied=False)
FILES = ("mamba", "mamba_layernorm")


# Arrays are small: compiling takes most of the time.
quickly_compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def shapes_of(config: MambaByteConfig) -> dict:
    inputs = jnp.ones((1, 2), jnp.int32)
    tree = jax.eval_shape(MambaByte(config).init, jax.random.key(0), inputs, inputs)["params"]
    return {path: leaf.shape for path, leaf in flattened(tree).items()}


@made_once
def params_of(config: MambaByteConfig, seed: int = 0):
    """Initial parameters, moved off 0 and 1."""
    inputs = jnp.ones((1, 2), jnp.int32)
    params = MambaByte(config).init(jax.random.key(seed), inputs, inputs)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(random.standard_normal(x.shape), x.dtype), params
    )


@functools.cache
def imported(name: str):
    """A file's vectors, its config, and our parameters."""
    vectors = golden.read(name)
    tensors = {key: golden.tensor_of(x) for key, x in vectors.weights.items()}
    config, tensors, _ = layout.read_settings(vectors.settings, tensors, name)
    weights = {key: tensor.all() for key, tensor in tensors.items()}
    params = golden.params_of(weights, layout.parts(config.model), shapes_of(config.model))
    return vectors, config, params


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("name", FILES)
def test_public_vectors(name, implementation):
    vectors, config, params = imported(name)
    assert config.model.norm == ("layer" if name == "mamba_layernorm" else "rms")
    assert config.model.tied == (name == "mamba")

    @quickly_compiled
    def outputs(params, arrays):
        def loss(params):
            found = forward(config, params, arrays, jnp.float32, implementation)
            next_B1 = arrays["next_token"][:, None]
            targets = jnp.concatenate([arrays["tokens"][:, 1:], next_B1], axis=1)
            log_probs = jax.nn.log_softmax(found["logits"])
            return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1).mean(), found

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, found), grads = outputs(params, vectors.inputs)
    assert vectors.inputs.keys() == set(FORWARD_INPUTS)
    assert found.keys() | {"loss"} == vectors.expected.keys()
    found |= {"loss": loss}
    for key, expected in vectors.expected.items():
        array = np.asarray(found[key])
        if key in ("logits", "hidden_states"):
            array = array[..., vectors.positions, :]
        np.testing.assert_allclose(array, expected, atol=golden.ABSOLUTE, rtol=0, err_msg=key)
    norms = {layout.public_name(key): norm for key, norm in vectors.gradient_norms.items()}
    golden.check_gradient_norms(grads, layout.parts(config.model), norms)


N = 40
TEXTS = (9, 1, 14)  # lengths of documents


def row_of(lengths, seed: int = 3):
    """Random bytes in documents of those lengths, then padding: ids and documents, [N]."""
    ids = np.random.default_rng(seed).integers(4, 260, N).astype(np.int32)
    documents = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    documents = np.pad(documents, (0, N - len(documents)))
    return np.where(documents > 0, ids, 0), documents


@functools.cache
def scored_by(implementation: str):
    """(params, bytes_BN, documents_BN) -> logits."""
    model = MambaByte(TINY, implementation=implementation)
    return quickly_compiled(lambda params, *rows: model.apply({"params": params}, *rows)[0])


@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_documents_are_apart(implementation):
    """A document scores the same alone, at any offset, and beside any other row."""
    ids, documents = row_of(TEXTS)
    begins = np.cumsum((0, *TEXTS))
    rows = [(ids, documents)]
    for begin, length in zip(begins, TEXTS, strict=False):
        alone = np.zeros((2, N), np.int32)
        alone[0, :length], alone[1, :length] = ids[begin : begin + length], 1
        rows.append(alone)
    logits = scored_by(implementation)(params_of(TINY), *map(np.stack, zip(*rows, strict=True)))
    for i, (begin, length) in enumerate(zip(begins, TEXTS, strict=False)):
        packed = logits[0, begin : begin + length]
        np.testing.assert_allclose(packed, logits[i + 1, :length], atol=1e-5)

    # With all other documents and rows changed, the last document's logits are the same bit for
    # bit; with its own end changed, they are up to there.
    other, _ = row_of(TEXTS, seed=4)
    last, later = begins[2], begins[2] + 5
    changed = np.where(documents == 3, ids, other)
    cut = np.where(np.arange(N) < later, ids, other)
    given = np.stack([ids, changed, cut, other]), np.stack([documents] * 4)
    logits = scored_by(implementation)(params_of(TINY), *given)
    np.testing.assert_array_equal(logits[0, last : begins[3]], logits[1, last : begins[3]])
    np.testing.assert_array_equal(logits[0, :later], logits[2, :later])
    assert abs(logits[0, later] - logits[2, later]).max() > 1e-4


@pytest.mark.parametrize("implementation", ["dense", "xla", "pallas_tpu_interpreted"])
def test_no_gradient_from_elsewhere(implementation):
    """The Jacobian over (logit position, byte position) is lower triangular in each document, and
    zero between documents. Every position has an embedding of its own."""
    ids, documents = row_of(TEXTS)
    given, model = params_of(TINY), MambaByte(TINY, implementation=implementation)
    mix_NV = np.random.default_rng(5).normal(size=(N, 260)).astype(np.float32)
    used = sum(TEXTS)

    @quickly_compiled
    def influence(bytes_VD):
        def mixed(bytes_VD):
            own, places = given | {"bytes_VD": bytes_VD}, jnp.arange(N, dtype=jnp.int32)[None]
            logits_BNV = model.apply({"params": own}, places, documents[None])[0]
            return (logits_BNV[0] * mix_NV).sum(axis=-1)

        _, pull = jax.vjp(mixed, bytes_VD)
        return jax.lax.map(lambda row_N: (pull(row_N)[0] ** 2).sum(axis=-1), jnp.eye(N)[:used])

    table = given["bytes_VD"]
    grid = np.asarray(influence(table.at[:N].set(table[ids])))[:, :N]
    same = documents[:used, None] == documents[None]
    allowed = np.tril(np.ones((used, N), bool)) & same
    assert not grid[~allowed].any()
    assert (grid[allowed] > 0).all()


@pytest.mark.parametrize("remat", ["none", "products", "full"])
def test_scan_equals_loop_and_remat_equals_none(remat):
    ids, documents = (x[None] for x in row_of(TEXTS))
    weights = (documents > 0)[..., None]

    def gradients(config, scanned, params):
        model = MambaByte(config, implementation="xla", scanned=scanned)

        def loss(params):
            return ((model.apply({"params": params}, ids, documents)[0] * weights) ** 2).mean()

        return quickly_compiled(jax.grad(loss))(params)

    expected = flattened(gradients(TINY, False, unscanned(params_of(TINY))))
    found = gradients(dataclasses.replace(TINY, remat=remat), True, params_of(TINY))
    for path, ours in flattened(unscanned(found)).items():
        np.testing.assert_allclose(ours, expected[path], atol=1e-6, rtol=1e-4, err_msg=path)


def test_letters():
    """Every parameter's sizes are those of its letters."""
    sizes = {"V": 260, "D": 16, "I": 32, "U": 4, "A": 4, "Z": 1, "L": 2}
    tied = dataclasses.replace(TINY, norm="layer", tied=True)
    for config in (TINY, tied):
        for path, shape in shapes_of(config).items():
            letters = [letter for letter, _ in suffix_axes(path.rpartition("/")[2])]
            assert [sizes[letter] for letter in letters] == list(shape), path
    assert shapes_of(TINY).keys() - shapes_of(tied).keys() == {"head_DV"}
    assert shapes_of(tied).keys() - shapes_of(TINY).keys() == {
        "norm_bias_D", "blocks/norm_bias_LD",
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_cached_equals_whole(norm):
    """Rows of different lengths in one batch, of which one waits now and then."""
    config = dataclasses.replace(TINY, norm=norm)
    cached = cached_mambabyte(ModelConfig(config), None, jnp.float32)
    assert not cached.grows and not cached.patched
    params = cached.prepared(params_of(config), None)
    ids_BN = np.random.default_rng(6).integers(4, 260, (3, 24)).astype(np.int32)
    model = MambaByte(config, implementation="xla")
    given = {"params": params_of(config)}, ids_BN, np.ones_like(ids_BN)
    whole = np.asarray(quickly_compiled(model.apply)(*given)[0])
    length_B = np.array([1, 5, 9], np.int32)
    prompts = np.where(np.arange(9) < length_B[:, None], ids_BN[:, :9], 0)
    memory = quickly_compiled(cached.prefill)(params, prompts, length_B)
    advance = quickly_compiled(cached.advance)
    sizes = jax.tree.map(jnp.shape, memory)
    for tick in range(15):
        logits_BV, memory = cached.predict(params, memory)
        count_B = np.asarray(memory.count_B)
        np.testing.assert_allclose(logits_BV, whole[range(3), count_B - 1], atol=2e-5)
        go_B = np.array([True, tick % 3 > 0, True])
        memory = advance(params, memory, ids_BN[range(3), count_B], go_B)
    assert list(memory.count_B) == [16, 15, 24] and jax.tree.map(jnp.shape, memory) == sizes


def test_bfloat16():
    """Products in bfloat16; the residual, the scan and what decoding keeps of it are fp32."""
    cached = cached_mambabyte(ModelConfig(TINY), None, jnp.bfloat16)
    params = cached.prepared(params_of(TINY), None)
    dtypes = {name: x.dtype.name for name, x in params["model"]["block_0"].items()}
    kept = {name for name, dtype in dtypes.items() if dtype == "float32"}
    assert kept == {"norm_D", "taps_AI", "taps_bias_I", "step_bias_I", "log_rates_IU", "skip_I"}
    ids, documents = (x[None] for x in row_of(TEXTS))
    model = MambaByte(TINY, jnp.bfloat16, "xla")
    logits, out = quickly_compiled(model.apply)({"params": params_of(TINY)}, ids, documents)
    assert {x.dtype.name for x in (logits, out["states"], out["past"].state_BIU)} == {"float32"}
    exact = scored_by("xla")(params_of(TINY), ids, documents)
    assert 1e-4 < abs(logits - exact)[documents > 0].max() < 0.1 * abs(exact).max()


def test_flops():
    """The published figures, and a count by hand of one layer."""
    for layers, width, count in ((53, 1024, 713), (48, 1792, 1957)):
        config = MambaByteConfig(layers, width, alphabet="mambabyte")
        assert round(paper_flops(config, 8192, 0) / 1e6) == count
    layer = 4 * 16 * 32 + 8 * 32 + 2 * 32 * (1 + 8) + 2 * 32 + 6 * 32 * 4 + 2 * 32 * 16
    assert forward_flops(TINY, N, 0) == N * (2 * layer + 2 * 16 * 260)
    for remat, more in (("none", 0), ("products", 0), ("full", layer - 2 * 32 * 16)):
        config = dataclasses.replace(TINY, remat=remat)
        assert recomputed_flops(config, N, 0) == N * 2 * (8 * 32 + 4 * 32 * 4 + more)


def test_published_sizes():
    for layers, width, count in (
        (53, 1024, 353_628_160), (48, 1792, 973_387_520), (48, 2304, 1_605_392_640),
    ):  # fmt: skip
        config = MambaByteConfig(layers, width, alphabet="mambabyte")
        assert sum(np.prod(shape) for shape in shapes_of(config).values()) == count


def test_initial_values():
    """Steps between 0.001 and 0.1, rates 1, 2, ...; a layer's output less the more layers."""
    inputs = jnp.ones((1, 2), jnp.int32)
    params = MambaByte(TINY).init(jax.random.key(0), inputs, inputs)["params"]
    blocks = params["blocks"]
    steps = np.asarray(jax.nn.softplus(blocks["step_bias_LI"]))
    assert steps.min() > 0.999e-3 and steps.max() < 0.1001 and steps.std() > 0.01
    np.testing.assert_allclose(np.exp(blocks["log_rates_LIU"][1, 7]), [1, 2, 3, 4], rtol=1e-6)
    assert (blocks["skip_LI"] == 1).all()
    bound = 32**-0.5 / 2**0.5
    assert bound * 0.9 < abs(blocks["project_LID"]).max() <= bound
    assert abs(params["bytes_VD"].std() - 0.02) < 1e-3
    assert abs(blocks["value_LDI"][0] - blocks["value_LDI"][1]).max() > 0.1


def test_settings():
    config = MambaByteConfig()
    assert (config.inner, config.rank) == (2048, 64)
    assert config.split_by_tensor == {"mambabyte.expand x mambabyte.width": 2048}
    assert "53 layers of 1024" in config.summary()
    assert [TINY.layers_in_arrays(stacked) for stacked in (True, False)] == [0, 2]
    with pytest.raises(ValueError, match=r"mambabyte\.norm is 'batch', not one of rms, layer"):
        MambaByteConfig(norm="batch")
    names = (None, "dense", "pallas_tpu", "pallas_gpu", "pallas_gpu_interpreted")
    found = [scan_implementation(name) for name in names]
    assert found == [None, "dense", "pallas_tpu", "xla", "xla"]


def tensors_named(vectors) -> dict:
    return {name: golden.tensor_of(x) for name, x in vectors.weights.items()}


@pytest.mark.parametrize("name", FILES)
def test_their_tensors_come_back(name):
    vectors, config, params = imported(name)
    parts = layout.parts(config.model)
    leaves = {path: leaf_of(np.asarray(x)) for path, x in flattened(params).items()}
    found = {key: tensor.all() for key, tensor in tensors_of(leaves, parts, {}).items()}
    assert found.keys() == {layout.public_name(key) for key in vectors.weights}
    for key, array in vectors.weights.items():
        np.testing.assert_array_equal(found[layout.public_name(key)], array)
    if name == "mamba":
        again = layout.written_settings(config, "float32")
        assert layout.read_settings(again, tensors_named(vectors), "x")[0] == config
    else:
        with pytest.raises(ValueError, match="RMS norms only, and this model has layer norms"):
            layout.written_settings(config, "float32")


def test_tensors_decide():
    """Norms and heads, in the names of all three layouts."""
    mamba, layered = golden.read("mamba"), golden.read("mamba_layernorm")
    tensors = tensors_named(mamba)
    embedding = tensors["backbone.embeddings.weight"]
    doubled = tensors | {"lm_head.weight": embedding}
    config, kept, notes = layout.read_settings(mamba.settings, doubled, "x")
    assert config.model.tied and "lm_head.weight" not in kept and "a copy of" in notes[0]
    other = doubled | {"lm_head.weight": golden.tensor_of(embedding.all() + 1)}
    config, kept, notes = layout.read_settings(mamba.settings, other, "x")
    assert not config.model.tied and "lm_head.weight" in kept and "differs" in notes[0]

    theirs = layered.settings | {"rms_norm": True}
    theirs.pop("tie_embeddings")
    tensors = tensors_named(layered)
    config, _, notes = layout.read_settings(theirs, tensors, "x")
    assert config.model.norm == "layer" and "layer norms, as the tensors say" in notes[0]
    assert not config.model.tied and config.model.step_rank == 0
    authors = {}
    for name, tensor in tensors.items():
        for new, old in (
            ("backbone.embedding.", "mambabyte.token_embedding."),
            ("backbone.norm_f.", "mambabyte.final_norm."), ("backbone.", "mambabyte."),
        ):  # fmt: skip
            name = name.replace(new, old)
        authors[name] = tensor
    again, kept, _ = layout.read_settings(theirs, authors, "x")
    assert again == config and kept.keys() == set(map(layout.public_name, layered.weights))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("mamba", {"use_bias": True}, "use_bias is True; supported: False"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("mamba", {"intermediate_size": 50}, r"intermediate_size \(50\) must be .* \(48\)"),
        ("mamba", {"vocab_size": 50280}, "vocab_size is 50280; supported: 256, 260"),
        ("mamba", {"surprise": 1}, "field 'surprise'"),
        ("mamba", {"time_step_rank": "many"}, "time_step_rank: rank is 'many'; supported: 'auto'"),
        ("mamba_layernorm", {"d_intermediate": 8}, "d_intermediate is 8; supported: 0"),
        ("mamba_layernorm", {"attn_layer_idx": [3]}, "attn_layer_idx is"),
        ("mamba_layernorm", {"ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2'"),
        ("mamba_layernorm", {"vocab_size": 257}, r"\(8\) must divide vocab_size \(257\)"),
    ],
)
def test_refused(name, change, why):
    vectors = golden.read(name)
    with pytest.raises(ValueError, match=f"^x.*{why}"):
        layout.read_settings(vectors.settings | change, tensors_named(vectors), "x")
