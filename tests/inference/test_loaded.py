"""The public door: what `bltjax.load` gives says the same as the programs."""

import jax.numpy as jnp
import numpy as np
import pytest

import bltjax
from bltjax.__main__ import main
from bltjax.attention.dense import dense
from bltjax.configured import batch_logits, make_model
from bltjax.data.batches import one_row
from bltjax.model.blt import cross_attention
from bltjax.text.patching import patch_starts
from bltjax.weights.export import load_params
from bltjax.weights.workdir import save_params

TEXT = "the patch begins where the next byte is hard to guess; 日本 żółć"


@pytest.fixture(scope="module")
def blt(runs):
    return bltjax.load(str(runs.blt))


@pytest.fixture(scope="module")
def byte_lm(runs):
    return bltjax.load(runs.byte_lm)


def test_config(blt, byte_lm):
    assert blt.config.threshold == 4.0 and blt.config.patching.max_patch_bytes == 12
    assert blt.config.model.latent.width == 32
    assert blt.model.entropy_model.config.model == byte_lm.config.model
    assert byte_lm.config.patching is None and byte_lm.config.threshold is None


def test_logits_are_the_models(blt, byte_lm):
    for model in (blt, byte_lm):
        logits = model.logits(TEXT)
        assert logits.shape == (len(TEXT.encode()) + 1, 260) and logits.dtype == np.float32
        ids = np.concatenate([[1], np.frombuffer(TEXT.encode(), np.uint8) + 4]).astype(np.int32)
        starts = None
        if model is blt:
            starts = patch_starts(model.config.patching, ids, model.entropies(TEXT))
        batch = one_row(ids, starts, len(ids))
        module = make_model(model.config.model, len(ids), jnp.float32, "dense")
        whole = batch_logits(module, model.params, batch)[0]
        np.testing.assert_allclose(logits, whole, atol=2e-5, rtol=0)
        for prefix in ("", TEXT[:7]):  # nothing that follows changes a row
            size = len(prefix.encode()) + 1
            np.testing.assert_allclose(model.logits(prefix), logits[:size], atol=2e-5, rtol=0)


def test_patches_join_to_the_text(blt):
    for text in (TEXT, TEXT.encode(), b"\xff\x80", "", "x"):
        data = text if isinstance(text, bytes) else text.encode()
        assert b"".join(blt.patches(text)) == data
        assert all(blt.patches(text))
    assert blt.entropies(TEXT).shape == (len(TEXT.encode()) + 1,)


def test_bits_per_byte(blt, byte_lm):
    for model in (blt, byte_lm):
        ids = np.frombuffer(TEXT.encode(), np.uint8).astype(int) + 4
        logits = model.logits(TEXT).astype(np.float64)
        nats = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(len(ids)), ids]
        assert model.bits_per_byte(TEXT) == pytest.approx(nats.mean() / np.log(2), rel=1e-5)
        with pytest.raises(ValueError, match="empty text"):
            model.bits_per_byte("")


def test_next_bytes_are_the_likeliest(blt, byte_lm):
    for model in (blt, byte_lm):
        chances = np.exp(model.logits(TEXT)[-1].astype(np.float64))
        chances /= chances.sum()
        found = model.next_bytes(TEXT, 257)
        assert {byte for byte, _ in found} == {b"", *(bytes([value]) for value in range(256))}
        assert [chance for _, chance in found] == sorted(dict(found).values(), reverse=True)
        for byte, chance in found:
            assert chance == pytest.approx(chances[byte[0] + 4 if byte else 2], abs=1e-6)
        assert model.next_bytes(TEXT) == found[:5]
        first, chance = model.next_bytes(TEXT)[0]
        assert first and "".join(model.generate(TEXT, max_bytes=1)) == first.decode(
            errors="replace"
        )


def test_generation(blt):
    pieces = list(blt.generate("the ", max_bytes=6))
    assert all(isinstance(piece, str) for piece in pieces)
    assert "".join(pieces) == "".join(blt.generate("the ", max_bytes=6))
    assert list(blt.generate("the ", max_bytes=0)) == []


def test_cross_weights_are_those_of_the_attention(blt, monkeypatch):
    """Values, weighted by them, equal the output of each cross-attention."""
    met, length, slots = [], len(TEXT.encode()) + 1, blt.config.model.cross.slots

    def attention(q_BQGC, k_BTGC, v_BTGC, *ranges, **options):
        out_BQGC = dense(q_BQGC, k_BTGC, v_BTGC, *ranges)
        met.append((np.asarray(v_BTGC[0]), np.asarray(out_BQGC[0])))
        return out_BQGC

    monkeypatch.setattr(cross_attention, "range_attention", attention)
    found = blt.cross_weights(TEXT)
    starts_N1 = blt.starts(TEXT)
    begins = np.flatnonzero(starts_N1[:-1])
    layers = len(found.encoder_LKGN)
    assert layers and len(found.decoder_LKGN) and len(met) == layers + len(found.decoder_LKGN)
    for weights_KGN, (v_NGC, out_SGC) in zip(found.encoder_LKGN, met, strict=False):
        np.testing.assert_allclose(np.add.reduceat(weights_KGN, begins, axis=2), 1, atol=1e-6)
        parts_NKGC = np.einsum("KGN,NGC->NKGC", weights_KGN, v_NGC[:length])
        sums_PKGC = np.add.reduceat(parts_NKGC, begins, axis=0)
        out_PKGC = out_SGC.reshape(-1, *sums_PKGC.shape[1:])[: len(begins)]
        np.testing.assert_allclose(sums_PKGC, out_PKGC, atol=1e-5)
    reads_N = np.cumsum(starts_N1)[1:] - 2
    reads_N[0] = 0  # BOS closes its own patch, and reads that
    for weights_KGN, (v_SGC, out_NGC) in zip(found.decoder_LKGN, met[layers:], strict=True):
        v_PKGC = v_SGC.reshape(-1, slots, *v_SGC.shape[1:])
        read_NGC = np.einsum("KGN,NKGC->NGC", weights_KGN, v_PKGC[reads_N])
        np.testing.assert_allclose(read_NGC, out_NGC[:length], atol=1e-5)


@pytest.fixture(scope="module")
def broken(runs, tmp_path_factory):
    """A byte LM with one NaN among its parameters, as a work directory."""
    model = load_params(runs.byte_lm)
    block = model.params["block_0"]
    block["down_FE"] = block["down_FE"].at[0, 0].set(jnp.nan)
    folder = tmp_path_factory.mktemp("broken") / "lm"
    save_params(folder, model, model.step)
    return folder


def test_what_is_not_finite_is_an_error(broken, runs, tmp_path, capsys):
    """In Python and by every command: it names the parameter, and leaves no result."""
    model, why = bltjax.load(broken), "parameter block_0/down_FE holds 1 value that is not finite"
    for ask in (model.logits, model.bits_per_byte, model.entropies):
        with pytest.raises(FloatingPointError, match=why):
            ask(TEXT)
    with pytest.raises(FloatingPointError, match=why):
        list(model.generate("the"))
    (tmp_path / "prompts.jsonl").write_text('"the"\n')
    (tmp_path / "text.txt").write_text(TEXT)
    here = f"--workdir={broken}"
    for words in (
        ["generate", here, "--prompt=the"],
        ["generate", here, f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path / 'out'}"],
        ["evaluate", here, f"--source={tmp_path / 'text.txt'}", f"--out={tmp_path / 'json'}"],
        ["patches", here, "--text=the", f"--html={tmp_path / 'html'}"],
        ["entropies", f"--byte_lm={broken}", f"--source={tmp_path}", f"--out={tmp_path / 'r'}"],
    ):
        assert main(words) == 1, words
        error = capsys.readouterr().err.splitlines()[-1]
        assert why in error and "finite" in error and "Traceback" not in error
    assert not (tmp_path / "json").exists() and not (tmp_path / "html").exists()
    assert (tmp_path / "out").read_text() == "" and not list(
        (tmp_path / "r").glob("*.array_record")
    )


def test_what_a_byte_lm_lacks(byte_lm, tmp_path):
    with pytest.raises(ValueError, match="a byte LM has no patches"):
        byte_lm.patches(TEXT)
    with pytest.raises(ValueError, match="a byte LM has no patches"):
        byte_lm.cross_weights(TEXT)
    with pytest.raises(ValueError, match="neither a training run nor an export"):
        bltjax.load(tmp_path)
