"""A document's entropies depend on the document alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.configured import initial_params
from bltjax.inference.entropy import score_documents
from bltjax.model.byte_lm import ByteLM, ByteLMConfig, entropies_of
from bltjax.text.alphabet import encode

CONFIG = ByteLMConfig(layers=3, width=16, heads=2, hidden=32, window=16)
RANDOM = np.random.default_rng(3)
TEXTS = [RANDOM.integers(0, 256, n).astype(np.uint8) for n in (1, 700, 5, 3, 64, 300, 150, 2, 31)]


@functools.cache
def params():
    # A sharper head than at the start of training, so that entropies vary.
    fresh = initial_params(CONFIG, jax.random.key(0))
    return fresh | {"head_EV": fresh["head_EV"] * 2}


@jax.jit
def whole_row(ids_BN):
    """One forward pass over a row, unchunked."""
    model = ByteLM(CONFIG, implementation="dense")
    return entropies_of(model.apply({"params": params()}, ids_BN, jnp.ones_like(ids_BN))[0])


def alone(text):
    """Entropies of a document in a row of its own; zeros after it, which it can't see."""
    ids_N = encode(text, eos=False)
    row_N = np.pad(ids_N, (0, max(map(len, TEXTS)) + 1 - len(ids_N)))
    return np.asarray(whole_row(jnp.asarray(row_N)[None]))[0, : len(ids_N)]


@functools.cache
def expected():
    return [alone(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("lanes", "chunk"), [pytest.param(None, None, marks=pytest.mark.slow), (4, 64), (1, 32)]
)
def test_chunks_lanes_and_neighbours_do_not_matter(lanes, chunk):
    done = []
    found, padding = score_documents(
        CONFIG, params(), TEXTS, lanes=lanes, chunk=chunk, scored=done.append
    )
    for ours, whole in zip(found, expected(), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, whole, atol=1e-5, rtol=0)
    positions = sum(len(text) + 1 for text in TEXTS)
    assert sum(done) == positions
    if lanes is None:
        assert padding <= 0.03 * (positions + padding)
    # A boundary is a threshold: paths agree wherever the margin exceeds 1e-4.
    ours, whole = np.concatenate(found), np.concatenate(expected())
    threshold = float(np.median(whole))
    near = np.abs(whole - threshold) <= 1e-4
    print(f"{near.sum()} near-ties of {len(near)}")
    assert ((ours > threshold) == (whole > threshold))[~near].all()


def test_adding_documents_changes_nothing():
    some, _ = score_documents(CONFIG, params(), TEXTS[1:4])
    for ours, whole in zip(some, expected()[1:4], strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5, rtol=0)


def test_entropies_that_are_not_finite_are_refused_with_their_place():
    odd = next(byte for byte in range(256) if not (TEXTS[4] == byte).any())
    text = np.append(TEXTS[4], np.uint8(odd))
    params_NaN = params() | {"bytes_VE": params()["bytes_VE"].at[4 + odd, 3].set(jnp.nan)}
    place = int(np.argmax(text == odd)) + 1
    with pytest.raises(FloatingPointError) as raised:
        score_documents(CONFIG, params_NaN, [text], name=lambda index: f"a.txt:{index}")
    named = re.fullmatch(
        r"a.txt:0 \(.*, 65 bytes\): the entropy after its first (\d+) bytes is not finite;"
        r" parameter bytes_VE holds 1 value that is not finite",
        str(raised.value),
    )
    # A masked value is multiplied by zero, so its NaN may spread to positions just before it.
    assert 0 <= place - int(named[1]) < CONFIG.window


def test_entropy_of_known_distributions():
    logits = jnp.full((1, 2, 260), -jnp.inf).at[:, 0].set(0.0).at[:, 1, 5].set(0.0)
    np.testing.assert_allclose(entropies_of(logits)[0], [np.log(260), 0.0], atol=1e-5)
