"""Models and texts that don't go together: refused with the rule, or handled, and never silent."""

import json

import golden
import numpy as np
import pytest
from test_public_weights import public_folder

import bltjax
from bltjax.__main__ import main
from bltjax.convert.convert import convert
from bltjax.inference.decoding.decoder import Decoder
from bltjax.inference.decoding.sampling import Sampling
from bltjax.system.paths import path_of


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(golden name) -> the folder of its export."""
    made = {}

    def export(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = public_folder(name, folder / "source")
            convert(path_of(source), path_of(folder / "export"), "orbax")
            made[name] = folder / "export"
        return made[name]

    return export


def lines(path, *texts: str):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_a_llama_without_its_tokenizer_is_scored_by_nothing(imported, tmp_path):
    source = public_folder("llama2", tmp_path / "source")
    (source / "tokenizer.json").unlink()
    convert(path_of(source), path_of(tmp_path / "export"), "orbax")
    text = lines(tmp_path / "text.jsonl", "some text")
    for ask in (bltjax.evaluate, lambda model, _: model.logits("a")):
        with pytest.raises(ValueError, match="has no tokenizer"):
            ask(bltjax.load(tmp_path / "export"), text)
    assert main(["evaluate", f"--workdir={tmp_path}/export", f"--source={text}"]) == 1


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    source = public_folder("llama3", tmp_path / "source")  # 340 ids
    other = golden.FOLDER / "llama2_tokenizer.json"  # 360
    (source / "tokenizer.json").write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"ids up to 359, but llama\.vocabulary is 340"):
        convert(path_of(source), path_of(tmp_path / "export"), "orbax")
    source = public_folder("llama2", tmp_path / "other")
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        convert(path_of(source), path_of(tmp_path / "export"), "orbax")


def test_specials_are_never_written(imported):
    model = bltjax.load(imported("llama2"))
    alphabet = model.vocabulary.alphabet
    lengths_V = model.vocabulary.tokenizer.lengths_V
    texts = alphabet.is_text(np.arange(alphabet.size))
    assert (texts == (lengths_V > 0)).all() and 0 < texts.sum() < alphabet.size
    assert all(piece or i == 0 for i, (piece, _) in enumerate(model.next_bytes("hi", 1)))
    hot = Sampling(temperature=4.0)
    text = b"".join(p.text for p in Decoder(model.model).generate([""], max_bytes=40, sampling=hot))
    assert 0 < len(text) <= 40


def test_ids_beyond_the_embedding_are_refused(imported):
    for name, given, why in (
        ("llama2", {"tokens": np.full((1, 8), 500)}, "tokens has ids from 500 to 500; .* of 360"),
        ("mamba", {"tokens": np.full((1, 8), 300)}, "300; a model of 256 ids takes 0 to 255"),
        ("mamba", {"tokens": np.arange(8)}, r"tokens is int64 \[8\], not whole numbers of 2 axes"),
        ("mamba", {"tokens": np.ones((1, 8))}, "tokens is float64"),
    ):
        with pytest.raises(ValueError, match=why):
            bltjax.load(imported(name)).forward(**given)


def test_texts_longer_than_a_table_of_positions_are_refused(imported):
    for name in ("megabyte", "spacebyte"):
        model, long = bltjax.load(imported(name)), "a b " * 100
        for ask in (model.logits, model.bits_per_byte, model.entropies):
            with pytest.raises(ValueError, match=rf"401 positions, .* {name}.context, 160"):
                ask(long)
        with pytest.raises(ValueError, match="exceed the context of 159 bytes"):
            model.generate([long])


def test_the_first_byte_that_is_never_predicted_is_in_no_figure(imported, tmp_path, capsys):
    folder = imported("mamba")
    text = lines(tmp_path / "text.jsonl", "some text", "b")
    assert main(["evaluate", f"--workdir={folder}", f"--source={text}"]) == 0
    assert "not predicted, and in no figure: each document's first byte" in capsys.readouterr().out
    model = bltjax.load(folder)
    assert bltjax.evaluate(model, text).text_bytes == len("some text") - 1
    with pytest.raises(ValueError, match="nothing to predict in its 1 documents"):
        bltjax.evaluate(model, lines(tmp_path / "one.jsonl", "a"))
    with pytest.raises(ValueError, match="nothing is predicted"):
        model.bits_per_byte("a")
    with pytest.raises(ValueError, match="prompt 2 is empty, and this model has no BOS"):
        model.generate(["a", ""])
    with pytest.raises(ValueError, match="valid_utf8 is for models of bytes with an EOS"):
        model.generate("a", valid_utf8=True)


def test_both_ways_to_bits_per_byte_agree(imported, tmp_path):
    for name, text in (
        ("llama2", "日本"), ("llama2", "7"), ("llama2", "the harbour was quiet"), ("llama3", "7"),
        ("megabyte", "the harbour"), ("spacebyte", "a-b c"), ("mamba", "the harbour"),
    ):  # fmt: skip
        model = bltjax.load(imported(name))
        found = bltjax.evaluate(model, lines(tmp_path / "text.jsonl", text))
        assert model.bits_per_byte(text) == pytest.approx(found.bits_per_byte, abs=2e-5), name
        assert found.text_bytes == len(text.encode()) - (name == "mamba")


def test_a_row_has_no_more_slots_than_a_spacebyte_has_positions(imported):
    model = bltjax.load(imported("spacebyte")).config
    with pytest.raises(ValueError, match=r"48 slots .* more than spacebyte\.global_context, 40"):
        type(model)(model.model, model.patching, 160, 48)


def test_reasons(imported):
    llama = bltjax.load(imported("llama3"))
    for ask, why in (
        (lambda: llama.embed("a"), "only a CANINE embeds texts"),
        (lambda: bltjax.load(imported("spacebyte")).cross_weights("a"), "only a BLT has cross-att"),
        (lambda: bltjax.load(imported("canine")).logits("a"), "a CANINE is an encoder"),
        (lambda: llama.generate("a", valid_utf8=True), "valid_utf8 is for models of bytes"),
    ):
        with pytest.raises(ValueError, match=why):
            ask()
