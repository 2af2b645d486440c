"""Generation: what is sampled, where it stops, and that it is the model's own next byte."""

import numpy as np
import pytest

from bltjax.alphabet import EOS, OFFSET, encode
from bltjax.evaluate import run_patching
from bltjax.export import load_params
from bltjax.generate import Predictor, Sampling, generate, sample


def scripted(text: bytes):
    """A predictor that writes `text` and then EOS, whatever the prompt."""
    ids = encode(text, bos=False)

    def predict(prefix):
        logits = np.zeros(260, np.float32)
        logits[ids[len(prefix) - 1]] = 9
        logits[[0, 1, 3]] = 99  # specials are never sampled
        return logits

    return predict


def written(text, **settings):
    settings.setdefault("max_bytes", 100)
    return b"".join(generate(scripted(text), b"", **settings))


def test_stops():
    assert written(b"hello") == b"hello"  # EOS
    assert written(b"hello", max_bytes=3) == b"hel"
    assert written(b"hello", max_bytes=0) == b""
    assert written(b"one. two", stop=b". ") == b"one"
    assert written(b"aab", stop=b"ab") == b"a"
    assert written(b"one.two.", stop=b". ") == b"one.two."  # held back, then let go


def test_bytes_that_may_begin_the_stop_string_are_held_back():
    pieces = list(generate(scripted(b"x.\n\ny"), b"", max_bytes=3, stop=b"\n\n"))
    assert pieces == [b"x", b".", b"\n"]


def test_sampling_keeps_what_it_should():
    logits = np.log(np.array([1e-9] * OFFSET + [0.5, 0.3, 0.15, 0.05] + [1e-12] * 252))
    random = np.random.default_rng(0)

    def seen(**settings):
        return {sample(logits, Sampling(1.0, **settings), random) - OFFSET for _ in range(300)}

    assert sample(logits, Sampling(), random) == OFFSET
    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.79) == {0, 1}
    assert seen(top_p=0.81) == {0, 1, 2}
    assert seen(top_p=1e-9) == {0}
    frozen = {sample(logits, Sampling(0.01), random) - OFFSET for _ in range(100)}
    assert frozen == {0}


def test_eos_may_be_sampled():
    logits = np.full(260, -9.0)
    logits[EOS] = 9
    assert sample(logits, Sampling(), np.random.default_rng(0)) == EOS


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1), "temperature is -1"),
        (Sampling(top_k=-2), "top_k is -2"),
        (Sampling(top_p=0), "top_p is 0"),
    ],
)
def test_settings_out_of_range(sampling, message):
    with pytest.raises(ValueError, match=message):
        list(generate(scripted(b"x"), b"", max_bytes=1, sampling=sampling))


@pytest.mark.parametrize("model", ["byte_lm", "blt"])
def test_trained_models_write_reproducibly(runs, model):
    workdir = getattr(runs, model)
    config, params, _ = load_params(workdir)
    predictor = Predictor(config, params, *run_patching(config, workdir))
    sampling = Sampling(temperature=1.0, seed=3)
    first, again = (
        b"".join(generate(predictor, "the \udcff", max_bytes=12, sampling=sampling))
        for _ in range(2)
    )
    assert first == again
    # Padding to the next bucket must not change a logit.
    ids = encode(b"the patch begins where the next byte is hard to guess, it is said", eos=False)
    short, long = predictor(ids[:64]), predictor(np.append(ids[:64], ids[64:65]))
    assert short.shape == long.shape == (260,)
    assert np.isfinite(short).all() and abs(short - long).max() > 0
