"""Sampling: which ids may be drawn, how often, and that text is never broken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.inference.decoding.sampling import (
    UTF8_LACKS,
    UTF8_NEXT,
    Sampling,
    candidates,
    chosen,
    permitted,
    utf8_state,
)
from bltjax.text.alphabet import EOS, OFFSET, VOCABULARY

LOGITS = np.log(np.array([1e-9] * OFFSET + [0.5, 0.3, 0.15, 0.05] + [1e-12] * 252, np.float32))


def distribution(sampling: Sampling, logits_V=LOGITS, used=()):
    """The probabilities that an id is drawn with."""
    used_BV = np.zeros((1, VOCABULARY), bool)
    used_BV[0, list(used)] = True
    state = (used_BV, jnp.zeros(1, jnp.int32), jnp.full(1, 9))
    found = candidates(sampling.steps(), sampling.numbers, jnp.asarray(logits_V)[None], *state)
    return np.asarray(jax.nn.softmax(found[0]))


def kept(**more) -> set[int]:
    return set(np.flatnonzero(distribution(Sampling(temperature=1.0, **more)) > 1e-6) - OFFSET)


def test_what_is_cut_off():
    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_p=0.79) == {0, 1}
    assert kept(top_p=0.81) == {0, 1, 2}
    assert kept(top_p=1e-9) == {0}
    assert kept(min_p=0.29) == {0, 1, 2}
    assert kept(min_p=0.31) == {0, 1}
    assert kept(top_k=3, top_p=0.8) == {0, 1}  # of what top-k left, 0.5 + 0.3 are 84 %
    assert kept(top_k=3, min_p=0.5) == {0, 1}


def test_temperature_and_penalty():
    np.testing.assert_allclose(
        distribution(Sampling(temperature=0.5))[OFFSET : OFFSET + 4],
        np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365,
        rtol=1e-4,
    )
    # Negative logits are multiplied: p becomes p ** 2.
    penalised = distribution(Sampling(temperature=1.0, repetition_penalty=2.0), used=[OFFSET])
    np.testing.assert_allclose(
        penalised[OFFSET : OFFSET + 4], np.array([0.25, 0.3, 0.15, 0.05]) / 0.75, rtol=1e-4
    )
    logits = LOGITS + 40  # and positive ones divided
    assert distribution(Sampling(1.0, repetition_penalty=1e3), logits, [OFFSET])[OFFSET] < 1e-9


def test_ties_go_by_the_smaller_id():
    flat = np.zeros(VOCABULARY, np.float32)
    found = distribution(Sampling(temperature=1.0, top_k=3), flat)
    assert np.flatnonzero(found).tolist() == [EOS, OFFSET, OFFSET + 1]


def test_draws_have_their_distribution():
    sampling = Sampling(temperature=0.8, top_p=0.9)
    expected = distribution(sampling)
    rows = 4000
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS)[None], (rows, VOCABULARY))
    state = (jnp.zeros((rows, VOCABULARY), bool), jnp.zeros(rows, jnp.int32), jnp.full(rows, 9))
    keys_B = jax.vmap(jax.random.key)(jnp.arange(rows))
    found_BV = candidates(sampling.steps(), sampling.numbers, logits_BV, *state)
    ids = np.asarray(chosen(sampling.steps(), found_BV, keys_B, jnp.full(rows, 7)))
    counts = np.bincount(ids, minlength=VOCABULARY) / rows
    assert abs(counts - expected).max() < 4 * np.sqrt(0.25 / rows)
    # Another byte of the same rows is drawn independently.
    again = np.asarray(chosen(sampling.steps(), found_BV, keys_B, jnp.full(rows, 8)))
    assert 0.2 < (ids == again).mean() < 0.9


def test_specials_are_never_drawn_but_eos():
    logits = np.zeros(VOCABULARY, np.float32)
    logits[:OFFSET] = 50
    found = distribution(Sampling(temperature=1.0), logits)
    assert found[EOS] > 0.99 and found[[0, 1, 3]].max() == 0


@pytest.mark.parametrize(
    "settings_out_of_range",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -2},
        {"top_p": 0.0},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_settings_out_of_range(settings_out_of_range):
    (name,) = settings_out_of_range
    with pytest.raises(ValueError, match=f"{name} is"):
        Sampling(**settings_out_of_range)


@settings(print_blob=True, deadline=None, max_examples=200)
@given(text=st.text(max_size=5), cut=st.integers(0, 3), byte=st.integers(0, 255))
def test_utf8_table_is_pythons(text, cut, byte):
    """A byte may follow if and only if Python's decoder accepts it."""
    data = text.encode()
    data = data[: max(0, len(data) - cut)]
    state = utf8_state(data)

    def is_prefix(data: bytes) -> bool:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return error.reason == "unexpected end of data"
        return True

    assert is_prefix(data)
    assert (UTF8_NEXT[state, byte] >= 0) == is_prefix(data + bytes([byte]))
    lacks = int(UTF8_LACKS[state])
    whole = any(
        not _fails(data + bytes(tail))
        for tail in (
            [0x80] * lacks,
            [0xA0, *[0x80] * (lacks - 1)][:lacks],
            [0x90, 0x80, 0x80][:lacks],
        )
    )
    assert whole


def _fails(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


@functools.cache
def allowed():
    return jax.jit(functools.partial(permitted, Sampling(valid_utf8=True).steps()))


@settings(print_blob=True, deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 12))
def test_random_bytes_under_the_constraint_are_utf8(seed, length):
    """Some byte is always permitted, whatever was drawn before, and the text ends complete."""
    random = np.random.default_rng(seed)
    state, text = 0, b""
    for made in range(length):
        allowed_V = np.asarray(allowed()(np.array([state]), np.array([length - made])))[0]
        assert allowed_V.any() and not allowed_V[[0, 1, 3]].any()
        ids = np.flatnonzero(allowed_V)
        # Rare bytes as often as ASCII, because the test is about lead and continuation bytes.
        high = ids[ids >= OFFSET + 0x80]
        chosen_id = random.choice(high if high.size and random.random() < 0.8 else ids)
        if chosen_id == EOS:
            break
        text += bytes([chosen_id - OFFSET])
        state = int(UTF8_NEXT[state, text[-1]])
    text.decode()
