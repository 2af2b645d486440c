"""CANINE: as its public implementation, and what packing, masks and the objective must not leak."""

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

from bltjax.attention.pattern import Whole
from bltjax.config.letters import suffix_axes
from bltjax.config.model import ModelConfig
from bltjax.data.objectives.masks import masked
from bltjax.model.params import flattened
from bltjax.rivals.canine.bert_block import BertBlock
from bltjax.rivals.canine.model import (
    Canine,
    CanineConfig,
    forward,
    forward_flops,
    paper_flops,
    recomputed_flops,
)
from bltjax.rivals.canine.molecules import layout
from bltjax.text.characters import document_characters
from bltjax.weights.released.tensors import check_tensors, leaves_of, tensors_of
from bltjax.weights.rivals.canine import parts, read_settings, written_settings

CONFIG = CanineConfig(
    layers=2, width=16, heads=2, hidden=24, hashes=4, buckets=331, block=8, types=2, context=96,
    classes=61,
)  # fmt: skip
N, P, Q = 96, 24, 20
FAST = {"xla_backend_optimization_level": 0}  # to compile


def fresh(config: CanineConfig, key):
    two_BN = jnp.ones((1, 2), jnp.int32)
    return Canine(config, P).init(key, two_BN, two_BN)["params"]


def shapes_of(config: CanineConfig) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda key: fresh(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flattened(tree).items()}


@made_once
def initial():
    return jax.jit(lambda key: fresh(CONFIG, key), compiler_options=FAST)(jax.random.key(0))


@made_once
def params():
    """Random parameters, also of norms and biases, which begin at 1 and 0."""
    tree = initial()
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


@functools.cache
def program(row_patches: int = P):
    return jax.jit(Canine(CONFIG, row_patches).apply)


def row(documents, padding=0):
    """Characters and documents of one row, after `padding` characters of a document of its own."""
    parts = ([np.full(padding, 65)] if padding else []) + list(documents)
    characters = np.concatenate(parts)
    numbers = np.repeat(np.arange(1, len(parts) + 1), [len(x) for x in parts])
    room = N - len(characters)
    return np.pad(characters, (0, room)).astype(np.int32), np.pad(numbers, (0, room))


def batch(*rows):
    return [jnp.asarray(np.stack(part), jnp.int32) for part in zip(*rows, strict=True)]


def document(length: int) -> np.ndarray:
    random = np.random.default_rng(length)
    return random.integers(1, 0x110000, length)


@functools.cache
def public():
    """The golden file, its config and our parameters."""
    file = golden.read("canine")
    tensors = {name: golden.tensor_of(array) for name, array in file.weights.items()}
    config, left, notes = read_settings(file.settings, tensors, "config.json")
    assert left.keys() == tensors.keys()
    assert len(notes) == 1 and "was not published" in notes[0]
    model = config.model
    return file, config, golden.params_of(file.weights, parts(model), shapes_of(model))


@pytest.mark.parametrize("implementation", ["dense", "xla"])
def test_as_the_public_implementation(implementation, by_tiles):
    file, config, params = public()
    inputs = {name: jnp.asarray(x) for name, x in file.inputs.items()}
    seen_BN = inputs["attention_mask"].astype(jnp.float32)

    def loss(params):
        out = forward(config, params, inputs, jnp.float32, implementation)
        y = out["last_hidden_state"]
        squares = ((y**2).sum(axis=-1) * seen_BN).sum() / seen_BN.sum()
        return squares + out["pooler_output"].sum() + (y[..., 0] * seen_BN).sum(), out

    (total, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = dict(file.expected)
    np.testing.assert_allclose(total, expected.pop("loss"), rtol=1e-5)
    assert out.keys() == expected.keys()
    kept_BN = file.inputs["attention_mask"][:, file.positions] > 0
    for name, theirs in expected.items():
        ours = np.asarray(out[name])
        if ours.shape[1] == len(file.inputs["input_ids"][0]):
            ours, theirs = ours[:, file.positions][kept_BN], theirs[kept_BN]
        np.testing.assert_allclose(ours, theirs, atol=golden.ABSOLUTE, rtol=0, err_msg=name)
    # A bias of all keys changes no softmax: its gradient is rounding alone.
    norms = dict(file.gradient_norms)
    for name, grad in golden.public(grads, parts(config.model)).items():
        if name.endswith("key.bias"):
            found = float(np.linalg.norm(grad))
            assert max(found, norms[name]) < 1e-4
            norms[name] = found
    golden.check_gradient_norms(grads, parts(config.model), norms)


LENGTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 21)


@functools.cache
def alone():
    """Outputs of each document alone in its row."""
    hidden, out = program()({"params": params()}, *batch(*(row([document(x)]) for x in LENGTHS)))
    return np.asarray(hidden), jax.tree.map(np.asarray, out)


@pytest.mark.parametrize("offset", [0, 1, 6])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1]], ids=["rising", "falling"])
def test_packed_equals_alone(offset, lengths):
    """Documents of fewer characters than a molecule, and than two, are among them."""
    packed = row([document(x) for x in lengths], padding=offset)
    hidden, out = program()({"params": params()}, *batch(*[packed] * len(LENGTHS)))
    begin, slot = offset, int(offset > 0)
    for length in lengths:
        number, slots = LENGTHS.index(length), max(1, length // 4)
        expected_BND, expected = alone()
        here, there = slice(begin, begin + length), slice(slot, slot + slots)
        np.testing.assert_allclose(hidden[0, here], expected_BND[number, :length], atol=1e-5)
        for name in ("molecules_in_BPD", "molecules_out_BPD", "pooled_BPD", "pools_BP"):
            found, alike = out[name][0, there], expected[name][number, :slots]
            np.testing.assert_allclose(found, alike, atol=1e-5)
        begin, slot = begin + length, slot + slots


def test_a_document_alone_is_the_public_forward_pass():
    config = ModelConfig(dataclasses.replace(CONFIG, predicts=False), None, N, P)
    tree = {name: x for name, x in params().items() if name != "head"}
    ones = jnp.ones((1, 21), jnp.int32)
    inputs = {"input_ids": jnp.asarray(document(21), jnp.int32)[None]}
    inputs |= {"attention_mask": ones, "token_type_ids": 0 * ones}
    out = jax.jit(forward, static_argnums=(0, 3, 4))(config, tree, inputs, jnp.float32, None)
    hidden_BND, expected = alone()
    number = LENGTHS.index(21)
    np.testing.assert_allclose(out["last_hidden_state"][0], hidden_BND[number, :21], atol=1e-5)
    pooled_D = expected["pooled_BPD"][number, 0]
    np.testing.assert_allclose(out["pooler_output"][0], pooled_D, atol=1e-5)


def test_slots_beyond_the_last_are_left_out():
    """Who would read one reads zeros; other documents don't notice."""
    characters, documents = batch(row([document(8), document(21), document(9)]))
    whole, _ = program()({"params": params()}, characters, documents)
    less, out = program(4)({"params": params()}, characters, documents)
    assert out["molecules_in_BPD"].shape == (1, 4, 16) and np.isfinite(less).all()
    np.testing.assert_allclose(less[0, :8], whole[0, :8], atol=1e-5)
    assert np.abs(less - whole)[0, 8:38].max() > 1e-3
    found = layout(documents, CONFIG.rate, CONFIG.block, 4)
    assert set(np.asarray(found.reads_BN)[0, 8:29]) == {3, 4, 5, 6}


@functools.cache
def own_embeddings():
    """Parameters and characters such that each position has a row of the table of its own."""
    config = dataclasses.replace(CONFIG, hashes=1)
    tables = jax.random.normal(jax.random.key(5), (1, CONFIG.buckets, CONFIG.width))
    return config, params() | {"characters_RMC": tables}, (np.arange(N) + 1) * 31 % CONFIG.buckets


def test_no_gradient_from_other_documents_or_padding():
    """The gradient of each state by each position's embedding: none outside of its document, and
    from all of it, since the last layer sees it whole."""
    config, own, rows = own_embeddings()
    _, documents = batch(row([document(x) for x in (1, 2, 3, 6, 9, 21, 30)]))
    characters = jnp.arange(N, dtype=jnp.int32)[None]
    mix_ND = jax.random.normal(jax.random.key(6), (N, CONFIG.width))

    @jax.jit
    def influence(tables):
        def mixed(tables):
            tree = {"params": own | {"characters_RMC": tables}}
            hidden, _ = Canine(config, P).apply(tree, characters, documents)
            return (hidden[0] * mix_ND).sum(axis=-1)

        return (jacobian(mixed, tables) ** 2).sum(axis=(1, 3))

    grid = np.asarray(influence(own["characters_RMC"]))[:, rows]
    number = np.asarray(documents[0])
    same = (number[:, None] == number[None]) & (number > 0)
    used = number > 0
    assert ((grid > 0) == same)[used].all()


def predicted(documents, seed=0, kept=0.0):
    """A row with masks, and what the head predicts: masked, targets, weights."""
    random = np.random.default_rng(seed)
    found = [masked(x, random, share=0.5, kept=kept, most=8) for x in documents]
    begins = np.cumsum([0] + [len(x) for x in documents])[:-1]
    order = np.concatenate([begin + order for begin, (_, order) in zip(begins, found, strict=True)])
    targets = np.concatenate(documents)[order] % CONFIG.classes
    room = Q - len(order)
    hidden = row([x for x, _ in found])
    return *hidden, np.pad(order, (0, room), constant_values=N), np.pad(targets, (0, room))


TEXTS = ("a word", "zażółć gęślą jaźń", "\u65e5\u672c", "of three or four")


@functools.cache
def both():
    """Hidden states and predictions of rows."""
    model = Canine(CONFIG, P)

    @jax.jit
    def run(characters, documents, order, targets):
        tree = {"params": params()}
        hidden, _ = model.apply(tree, characters, documents)
        inputs = (hidden, order, targets, documents)
        return model.apply(tree, *inputs, method="predictions")

    return run


def test_predictions_of_packed_documents_equal_those_alone():
    documents = [document_characters(x.encode()) for x in TEXTS]
    packed = predicted(documents)
    number = packed[1][np.minimum(packed[2], N - 1)] * (packed[2] < N)
    rows, begins = [packed], np.cumsum([0] + [len(x) for x in documents])
    for place in range(len(documents)):
        chosen = number == place + 1
        here = slice(begins[place], begins[place + 1])
        room = Q - chosen.sum()
        order = np.pad(packed[2][chosen] - here.start, (0, room), constant_values=N)
        rows.append((*row([packed[0][here]]), order, np.pad(packed[3][chosen], (0, room))))
    logits = np.asarray(both()(*batch(*rows)))
    assert logits.shape == (len(rows), Q, CONFIG.classes) and logits.dtype == np.float32
    for place in range(len(documents)):
        chosen = number == place + 1
        assert chosen.any()
        expected = logits[place + 1, : chosen.sum()]
        np.testing.assert_allclose(logits[0, chosen], expected, atol=2e-5)


def test_a_masked_character_is_known_only_after_its_own_prediction():
    documents = [document_characters(x.encode()) for x in TEXTS]
    plain = predicted(documents)
    number = plain[1][np.minimum(plain[2], N - 1)] * (plain[2] < N)
    rows, steps = [plain], [2, 5, 11]
    for step in steps:
        changed = [x.copy() for x in documents]
        begins = np.cumsum([0] + [len(x) for x in documents])
        place = number[step] - 1
        changed[place][plain[2][step] - begins[place]] += 7
        rows.append(predicted(changed))
        assert (rows[-1][0] == plain[0]).all() and (rows[-1][3] != plain[3]).sum() == 1
    logits = np.asarray(both()(*batch(*rows)))
    for changed, step in zip(logits[1:], steps, strict=True):
        differs = (changed != logits[0]).any(axis=-1)
        after = (np.arange(Q) > step) & (number == number[step])
        assert after.any()
        assert (differs == after).all()


def test_no_gradient_from_later_predictions():
    """Each step's class has a row of the table of its own; a step's logits depend on the classes of
    earlier ones of its document alone."""
    documents = [document_characters(x.encode()) for x in TEXTS]
    characters, numbers, order, _ = batch(predicted(documents))
    targets = jnp.arange(Q, dtype=jnp.int32)[None]
    model = Canine(CONFIG, P)
    mix_QV = jax.random.normal(jax.random.key(7), (Q, CONFIG.classes))

    @jax.jit
    def influence(table):
        hidden, _ = model.apply({"params": params()}, characters, numbers)

        def mixed(table):
            tree = params() | {"head": params()["head"] | {"predicted_characters_VD": table}}
            inputs = (hidden, order, targets, numbers)
            logits = model.apply({"params": tree}, *inputs, method="predictions")
            return (logits[0] * mix_QV).sum(axis=-1)

        return (jacobian(mixed, table) ** 2).sum(axis=-1)

    grid = np.asarray(influence(params()["head"]["predicted_characters_VD"]))[:, :Q]
    there = np.asarray(order[0]) < N
    number = np.asarray(numbers[0])[np.minimum(order[0], N - 1)] * there
    earlier = np.tril(np.ones((Q, Q), bool), -1) & (number[:, None] == number[None])
    assert ((grid > 0) == earlier)[there].all()


def test_rows_are_apart():
    one, two = row([document(21)]), row([document(9), document(30)])
    first = program()({"params": params()}, *batch(one, one))[0]
    second = program()({"params": params()}, *batch(one, two))[0]
    assert (first[0] == second[0]).all()


def test_scan_equals_loop():
    characters, documents = batch(row([document(x) for x in (3, 9, 21, 30)]))
    _, out = program()({"params": params()}, characters, documents)
    ranges = layout(documents, CONFIG.rate, CONFIG.block, P).slots
    block = BertBlock(CONFIG.size, Whole(), jnp.float32, None)
    x_BPD = out["molecules_in_BPD"]
    for layer in range(CONFIG.layers):
        weights = {name.replace("_L", "_"): x[layer] for name, x in params()["deep"].items()}
        x_BPD, _ = block.apply({"params": weights}, x_BPD, ranges)
    np.testing.assert_allclose(x_BPD, out["molecules_out_BPD"], atol=1e-5)


def test_remat_equals_none():
    inputs = batch(row([document(x) for x in (3, 9, 21, 30)]))

    def gradients(remat):
        model = Canine(dataclasses.replace(CONFIG, remat=remat), P)

        def loss(params):
            return (model.apply({"params": params}, *inputs)[0] ** 2).mean()

        return jax.jit(jax.grad(loss), compiler_options=FAST)(params())

    plain = gradients("none")
    for remat in ("products", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, gradients(remat)
        )


def test_parameters():
    """Ranks are the letters', the published count, and initial values."""
    for path, shape in shapes_of(CONFIG).items():
        assert len(suffix_axes(path)) == len(shape), path
    published = shapes_of(CanineConfig(predicts=False))
    assert sum(map(np.prod, published.values())) == 132_082_944
    for path, x in flattened(initial()).items():
        expected = 1 if "norm" in path and "bias" not in path else 0
        if "bias" in path or "norm" in path:
            assert (x == expected).all(), path
        else:
            assert abs(np.std(x) - 0.0176) < 0.0176 * 4 / x.size**0.5 and abs(x).max() <= 0.04, path


def test_compute_in_bfloat16():
    characters, documents = batch(row([document(21), document(30)]))
    exact, _ = program()({"params": params()}, characters, documents)
    narrow = jax.jit(Canine(CONFIG, P, jnp.bfloat16).apply, compiler_options=FAST)
    found, out = narrow({"params": params()}, characters, documents)
    assert found.dtype == jnp.float32 and out["upsampled_BND"].dtype == jnp.bfloat16
    assert np.abs(found - exact)[0, :51].max() < 0.3


def test_flops():
    base = CanineConfig(predicts=False)
    exact = forward_flops(base, 2048, 512) / 2048
    assert round(exact / 1e6) == 93 and exact == paper_flops(base, 2048, 512)
    small = CanineConfig(layers=8, width=128, heads=4, hidden=512, predicts=False)
    assert round(forward_flops(small, 2048, 512) / 2048 / 1e6, 1) == 3.5
    # 320 predictions: the two layers that join, 320 x 321 / 2 pairs, the classes.
    head = 320 * (2 * 3 * 768 * 3072 + 8 * 768**2 + 4 * 768 * 3072 + 2 * 768 * 16384)
    head += 4 * 768 * 320 * 321 // 2
    assert forward_flops(CanineConfig(), 2048, 512) == forward_flops(base, 2048, 512) + head
    scores = 2 * 768 * (2048 * 128 + 12 * 512 * 512 + 2048 * 2048)
    assert recomputed_flops(base, 2048, 512) == scores
    full = recomputed_flops(dataclasses.replace(base, remat="full"), 2048, 512)
    last = 2 * 768 * 3072 * (2048 + 12 * 512 + 2048)
    convolutions = 2 * 768**2 * (4 * 512 + 8 * 2048)
    assert full == scores + forward_flops(base, 2048, 512) - convolutions - last


def test_rows_of_another_length_are_refused():
    file, config, params = public()
    short = {name: jnp.asarray(x[:, :3]) for name, x in file.inputs.items()}
    with pytest.raises(ValueError, match="3 characters is shorter than a molecule of 4"):
        forward(config, params, short, jnp.float32, "dense")
    long = {name: jnp.ones((1, 332), jnp.int32) for name in file.inputs}
    with pytest.raises(ValueError, match="332 characters is longer than 331 positions"):
        forward(config, params, long, jnp.float32, "dense")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, r"canine.heads \(5\) must divide canine.width \(16\)"),
        ({"hashes": 3}, r"canine.hashes \(3\) must divide canine.width \(16\)"),
        ({"hashes": 32, "width": 32}, r"canine.hashes \(32\) must be 1 ... 16"),
        ({"rate": 0}, "canine.rate is 0, not > 0"),
        ({"remat": "some"}, "canine.remat is 'some', not one of none, products, full"),
    ],
)
def test_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_weights_go_in_and_out():
    """Exactly, with a prefix, a task's head and the positions' numbers on the way in."""
    file, config, _ = public()
    tensors = {f"canine.{name}": golden.tensor_of(x) for name, x in file.weights.items()}
    tensors["canine.char_embeddings.position_ids"] = golden.tensor_of(np.arange(331)[None])
    tensors["classifier.weight"] = golden.tensor_of(np.zeros((2, 32), np.float32))
    again, left, notes = read_settings(file.settings, tensors, "config.json")
    assert again == config and len(notes) == 3
    shapes, made = shapes_of(config.model), parts(config.model)
    check_tensors(left, made, shapes, "a folder")
    leaves = leaves_of(left, made, shapes)
    back = tensors_of(leaves, made, {})
    assert back.keys() == file.weights.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor.all(), file.weights[name], err_msg=name)
    written = json.loads(json.dumps(written_settings(config, "float32")))
    assert read_settings(written, left, "config.json")[0] == config
    tensors["canine.char_embeddings.position_ids"] = golden.tensor_of(np.ones((1, 331)))
    with pytest.raises(ValueError, match=r"position_ids is not 0, 1, \.\.\. 330"):
        read_settings(file.settings, tensors, "config.json")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; supported: 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True; supported: False"),
        ({"num_hash_bucket": 3}, "did you mean 'num_hash_buckets'"),
        ({"max_position_embeddings": 400}, r"is 400, not downsampling_rate \(4\) ... .*\(331\)"),
        ({"num_hash_functions": 5}, r"canine.hashes \(5\) must divide canine.width \(32\)"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny', not float"),
    ],
)
def test_public_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^config.json.*{message}"):
        read_settings(public()[0].settings | changes, {}, "config.json")


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match=r"no way to say canine\.predicts"):
        written_settings(ModelConfig(CONFIG, None, N, P), "float32")
    other = dataclasses.replace(CONFIG, predicts=False)
    with pytest.raises(ValueError, match=r"no way to say canine\.context, unless it is"):
        written_settings(ModelConfig(other, None, N, P), "float32")


def test_masks_of_molecules():
    """The public mask hides the last whole molecule of a padded row; ours doesn't."""
    file, config, params = public()
    right = dataclasses.replace(
        config, model=dataclasses.replace(config.model, judged_by_next=False)
    )
    inputs = {name: jnp.asarray(x) for name, x in file.inputs.items()}
    run = jax.jit(forward, static_argnums=(0, 3, 4))
    ours, theirs = (run(c, params, inputs, jnp.float32, "dense") for c in (right, config))
    difference = np.abs(ours["last_hidden_state"] - theirs["last_hidden_state"]).max(axis=(1, 2))
    assert difference[0] < 1e-5 and 0.03 < difference[1] < 0.3


@pytest.mark.slow
def test_as_transformers_in_rows_of_many_lengths(by_tiles):
    """Also where a padded row ends with its block, or its molecule, and has a block of padding."""
    torch = pytest.importorskip("torch")
    from transformers import CanineConfig as TheirConfig
    from transformers import CanineModel

    torch.manual_seed(0)
    theirs = CanineModel(
        TheirConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            num_hash_functions=4, num_hash_buckets=128, max_position_embeddings=128,
            local_transformer_stride=16, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    tensors = {name: golden.tensor_of(x.numpy()) for name, x in theirs.state_dict().items()}
    values = json.loads(theirs.config.to_json_string(use_diff=False))
    config, left, _ = read_settings(values, tensors, "config.json")
    made, shapes = parts(config.model), shapes_of(config.model)
    params = golden.params_of({name: x.all() for name, x in left.items()}, made, shapes)
    run = jax.jit(forward, static_argnums=(0, 3, 4))
    random = np.random.default_rng(0)
    for length in (4, 7, 50, 80):
        sizes = [x for x in (1, 3, 4, 16, 17, 31, 32, 45, 64, 80) if x <= length]
        seen = (np.arange(length) < np.array(sizes)[:, None]).astype(np.int32)
        inputs = {
            "input_ids": random.integers(1, 0x110000, seen.shape).astype(np.int32) * seen,
            "attention_mask": seen,
            "token_type_ids": random.integers(0, 16, seen.shape).astype(np.int32),
        }
        with torch.no_grad():
            expected = theirs(**{name: torch.tensor(x).long() for name, x in inputs.items()})
        for implementation in ("dense", "xla"):
            out = run(config, params, inputs, jnp.float32, implementation)
            real = seen > 0
            for name in ("last_hidden_state", "pooler_output"):
                found, wanted = np.asarray(out[name]), getattr(expected, name).numpy()
                found, wanted = (x[real] if x.ndim == 3 else x for x in (found, wanted))
                np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=f"{name} {length}")
