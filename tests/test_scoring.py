"""A document's entropies depend on the document alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.alphabet import encode
from bltjax.config import ByteLMConfig
from bltjax.model import initial_params
from bltjax.model.byte_lm import ByteLM, entropies_of
from bltjax.scoring import score_documents

CONFIG = ByteLMConfig(layers=3, width=16, heads=2, hidden=32, window=16)
RANDOM = np.random.default_rng(3)
TEXTS = [RANDOM.integers(0, 256, n).astype(np.uint8) for n in (1, 700, 5, 3, 64, 300, 150, 2, 31)]


@functools.cache
def params():
    # A sharper head than at the start of training, so that entropies vary.
    fresh = initial_params(ByteLM(CONFIG), jax.random.key(0))
    return fresh | {"head_EV": fresh["head_EV"] * 2}


def alone(text):
    """One forward pass over the whole document, unchunked."""
    ids_BN = jnp.asarray(encode(text, eos=False))[None]
    logits_BNV, _ = ByteLM(CONFIG, implementation="dense").apply(
        {"params": params()}, ids_BN, jnp.ones_like(ids_BN)
    )
    return np.asarray(entropies_of(logits_BNV))[0]


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


def test_entropy_of_known_distributions():
    logits = jnp.full((1, 2, 260), -jnp.inf).at[:, 0].set(0.0).at[:, 1, 5].set(0.0)
    np.testing.assert_allclose(entropies_of(logits)[0], [np.log(260), 0.0], atol=1e-5)
