"""Texts as tokens: exact for any bytes, the library's own tokens for text, clear refusals."""

import argparse
import copy
import functools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from bltjax.data import tokenizer as program
from bltjax.text.alphabet import NO_BYTE
from bltjax.text.tokens import Tokenizer, bytes_per_token, load_tokens, positions_per_row
from bltjax.text.train_tokenizer import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "rivals"
ENGLISH = (
    "The patches begin where it's hard to guess, and end before 12345 others.\n\n  Never else. "
)
KINDS = ("llama2", "llama3", "metaspace", "gemma", "gpt2", "trained")


@functools.cache
def contents(kind: str) -> dict:
    """A tokenizer.json of each structure; not to be changed."""
    if kind == "trained":
        return json.loads(train_tokenizer(iter([ENGLISH.encode() * 3]), 300).to_str())
    base = "llama3" if kind in ("llama3", "gpt2") else "llama2"
    values = json.loads((GOLDEN / f"{base}_tokenizer.json").read_text(encoding="utf-8"))
    if kind == "metaspace":  # transformers' newer conversion of Llama 2's
        values["normalizer"] = None
        values["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True,
        }  # fmt: skip
    if kind == "gemma":  # no space before the text
        values["normalizer"] = values["normalizer"]["normalizers"][1]
    if kind == "gpt2":
        values["normalizer"] = {"type": "NFC"}
        values["pre_tokenizer"] = {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        }  # fmt: skip
    return values


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(contents(kind), kind)


def changed(kind: str, **changes) -> dict:
    """Contents with other fields; `model__vocab` is a field of the model."""
    values = copy.deepcopy(contents(kind))
    for name, value in changes.items():
        group, _, inner = name.rpartition("__")
        (values[group] if group else values)[inner] = value
    return values


SEAMS = [
    "▁",
    " ",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<|begin_of_text|>",
    "é",
    "日本",
    "\0",
    "e\u0301",
]
BYTES = st.lists(
    st.one_of(st.binary(max_size=6), st.sampled_from([seam.encode() for seam in SEAMS]))
).map(b"".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=BYTES)
@example(text=b"")
@example(text=b"\xff")
@example(text=b" \xff \xe2\x96")
@example(text=b"\xed\xa0\x80 lone surrogate")
@example(text=" ▁ ▁▁".encode())
@settings(max_examples=60, deadline=None)
def test_any_bytes_come_back(kind, text):
    tokenizer = tokenizer_of(kind)
    ids_N = tokenizer.encode(text)
    assert ids_N.dtype == np.int32 and tokenizer.decode(ids_N) == text
    assert tokenizer.lengths_V[ids_N].sum() == len(text) + (tokenizer.added if text else 0)
    assert (tokenizer.lengths_V[ids_N] > 0).all()
    assert b"".join(map(tokenizer.token_bytes, ids_N))[tokenizer.added if text else 0 :] == text
    document_N = tokenizer.document(text)
    assert document_N.tolist() == [tokenizer.bos, *ids_N, tokenizer.eos]
    counted_N = tokenizer.text_bytes(document_N)
    assert counted_N[counted_N < NO_BYTE].sum() == len(text)
    assert tokenizer.decode(document_N) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁<"), max_size=40))
@example(text=ENGLISH)
@settings(max_examples=60, deadline=None)
def test_tokens_are_the_librarys(kind, text):
    """Where it loses nothing: in text as it is normalised, without names of specials."""
    values = contents(kind)
    if kind == "gpt2":
        values = changed(kind, normalizer=None)
        values["pre_tokenizer"]["add_prefix_space"] = False
    if kind == "metaspace":
        text = text.lstrip(" ")  # it adds no space before one, so that two texts would be the same
    expected = Library.from_str(json.dumps(values)).encode(text, add_special_tokens=False).ids
    assert tokenizer_of(kind).encode(text.encode()).tolist() == expected


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_golden(kind):
    with np.load(GOLDEN / f"{kind}.npz") as file:
        tokens_BN, lengths_BN = file["inputs/tokens"], file["inputs/token_bytes"]
        texts = [file[f"inputs/text{row}"].astype(np.uint8).tobytes() for row in (0, 1)]
    tokenizer = load_tokens(str(GOLDEN / f"{kind}_tokenizer.json"))
    assert load_tokens(str(GOLDEN / f"{kind}_tokenizer.json")) is tokenizer
    for tokens_N, lengths_N, text in zip(tokens_BN, lengths_BN, texts, strict=True):
        ids_N = tokenizer.document(text)[: len(tokens_N)]
        np.testing.assert_array_equal(ids_N, tokens_N)
        np.testing.assert_array_equal(tokenizer.lengths_V[ids_N], lengths_N)
        assert text.startswith(tokenizer.decode(ids_N))
    expected = {"llama2": (360, 1, 2, 1), "llama3": (340, 338, 339, 0)}[kind]
    assert (tokenizer.vocabulary, tokenizer.bos, tokenizer.eos, tokenizer.added) == expected
    assert tokenizer.lengths_V.dtype == np.uint8 and len(tokenizer.lengths_V) == expected[0]


def test_the_added_space_is_taken_from_a_token_that_keeps_some():
    tokenizer = tokenizer_of("llama2")
    document_N = tokenizer.document(b"the harbour")
    lengths_N, counted_N = tokenizer.lengths_V[document_N], tokenizer.text_bytes(document_N)
    assert counted_N.sum() == 11 == lengths_N.sum() - 1
    assert ((counted_N > 0) == (lengths_N > 0)).all()
    only_N = tokenizer.encode(b"\xff")  # the space, and a byte: none has two
    assert tokenizer.text_bytes(only_N).tolist() == [NO_BYTE, 1]
    assert tokenizer.text_bytes(tokenizer.document(b"")).tolist() == [0, 0]


def test_added_tokens():
    """Specials are no text; the others are, and take no spaces beside them."""
    token = {
        "id": 340, "content": "<tool> x", "single_word": False, "lstrip": True, "rstrip": True,
        "normalized": False, "special": False,
    }  # fmt: skip
    added = contents("llama3")["added_tokens"]
    tokenizer = Tokenizer(changed("llama3", added_tokens=[*added, token]), "added")
    text = b"a  <tool> x  <|end_of_text|>"
    ids_N = tokenizer.encode(text)
    assert 340 in ids_N and 339 not in ids_N and tokenizer.decode(ids_N) == text
    assert tokenizer.token_bytes(340) == b"<tool> x" and tokenizer.token_bytes(339) == b""
    with pytest.raises(ValueError, match=r"token '<tool> x' has id 400, but is added as 340"):
        Tokenizer(changed("llama3", added_tokens=[*added, token | {"id": 400}]), "odd")


def test_specials_by_template_and_by_name():
    bare = changed("llama3", post_processor=None)
    assert (Tokenizer(bare, "x").bos, Tokenizer(bare, "x").eos) == (338, 339)
    template = copy.deepcopy(contents("llama3")["post_processor"])
    sequence = {"type": "Sequence", "processors": [template]}
    template["single"].append({"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}})
    tokenizer = Tokenizer(changed("llama3", post_processor=sequence), "x")
    assert (tokenizer.bos, tokenizer.eos) == (338, 338)
    nameless = Tokenizer(changed("llama3", post_processor=None, added_tokens=[]), "x")
    with pytest.raises(ValueError, match=r"x has no BOS: .* no token named <\|begin_of_text\|>, "):
        nameless.document(b"text")
    assert nameless.decode(nameless.encode(b"text")) == b"text"


def without(vocab: dict, *pieces: str) -> dict:
    """A vocabulary in which these pieces have other names."""
    return {piece * 9 if piece in pieces else piece: number for piece, number in vocab.items()}


def test_refused(tmp_path):
    vocab2, vocab3 = (contents(kind)["model"]["vocab"] for kind in ("llama2", "llama3"))
    merges = contents("llama3")["model"]["merges"]
    whole = [a for a in merges if "Ġ" not in "".join(a)]
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    spaces = {"type": "Whitespace"}
    dropping = {"type": "Sequence", "pretokenizers": [spaces, contents("gpt2")["pre_tokenizer"]]}
    for values, message in (
        ({"model": 3}, "x is not a tokenizer file of Hugging Face's"),
        ({}, "x is not a tokenizer file of Hugging Face's"),
        (changed("llama3", model=words), "type 'WordLevel'; supported: 'BPE'"),
        (changed("llama3", pre_tokenizer=None), "neither the pre-tokenizer ByteLevel nor byte_fa"),
        (changed("llama2", model__byte_fallback=False), "neither the pre-tokenizer ByteLevel nor"),
        (changed("llama2", model__vocab=without(vocab2, "<0x00>", "<0x7F>")), "for 2, .* '<0x00>'"),
        (
            changed("llama3", model__vocab=without(vocab3, "!", "Ġ"), model__merges=whole),
            "x is not a tokenizer file|no token for 2, the first of them 'Ġ'",
        ),
        (changed("llama3", normalizer={"type": "Lowercase"}), r"changes texts \(normalizer Lower"),
        (changed("llama3", model__end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
        (
            changed("gpt2", pre_tokenizer=dropping),
            "x loses text: the tokens of one of 34 bytes have 26",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Tokenizer(values, "x")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"tokenizer.json is not UTF-8"):
        load_tokens(str(path))
    with pytest.raises(FileNotFoundError):
        load_tokens(str(tmp_path / "none.json"))


def test_ids_beyond():
    tokenizer = tokenizer_of("llama2")
    for number in (360, -1):
        with pytest.raises(ValueError, match=rf"id {number} is not below the 360 of llama2's"):
            tokenizer.decode([1, number])
    tokenizer.check_model(360)
    with pytest.raises(ValueError, match=r"ids up to 359, but llama.vocabulary is 340: .* another"):
        tokenizer.check_model(340)


def test_identity():
    values = contents("llama3")
    other = Tokenizer(json.loads(json.dumps(values, indent=3, sort_keys=True)), "copy")
    assert other.identity == tokenizer_of("llama3").identity
    assert Tokenizer(changed("llama3", normalizer={"type": "NFC"}), "x").identity != other.identity


def test_a_copy_in_another_process():
    for kind in ("llama2", "llama3"):
        copied = pickle.loads(pickle.dumps(tokenizer_of(kind)))
        text = b"a <s> <|end_of_text|> \xff"
        assert copied.encode(text).tolist() == tokenizer_of(kind).encode(text).tolist()
        assert copied.decode(copied.document(text)) == text


def test_a_token_of_300_bytes():
    vocab = {token["content"]: token["id"] for token in contents("llama3")["added_tokens"]}
    vocab |= contents("llama3")["model"]["vocab"]
    run, merges = "x", []
    for _ in range(299):
        merges.append([run, "x"])
        run += "x"
        vocab.setdefault(run, len(vocab))
    with pytest.raises(ValueError, match=r"has 300 bytes, not 254 or fewer"):
        Tokenizer(changed("llama3", model__vocab=vocab, model__merges=merges), "x")


def test_training():
    texts = [ENGLISH.encode() * 2, b"\xffother \xe6\x97\xa5 text\xfe", b""]
    files = {train_tokenizer(iter(texts), 290).to_str() for _ in range(3)}
    assert len(files) == 1
    tokenizer = Tokenizer(json.loads(files.pop()), "trained")
    assert (tokenizer.vocabulary, tokenizer.bos, tokenizer.eos, tokenizer.added) == (290, 0, 1, 0)
    assert tokenizer.lengths_V.tolist()[:258] == [0, 0] + [1] * 256
    assert (tokenizer.lengths_V[258:] > 1).all()
    # Its words are Llama 3's.
    cut = contents("llama3")["pre_tokenizer"]["pretokenizers"][0]
    assert contents("trained")["pre_tokenizer"]["pretokenizers"][0] == cut
    with pytest.raises(ValueError, match=r"a vocabulary of 257 tokens is smaller than 258"):
        train_tokenizer(iter(texts), 257)
    with pytest.raises(ValueError, match=r"the text gives 261 tokens, not 8000"):
        train_tokenizer(iter([b"aab aab"]), 8000)


def test_positions():
    assert positions_per_row(2048, 4.0) == 512 and positions_per_row(2048, 4.16) == 512
    assert positions_per_row(2048, 3.99) == 576 and positions_per_row(1, 4.0) == 64
    tokenizer = tokenizer_of("trained")
    texts = [ENGLISH.encode(), b"more"]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert bytes_per_token(tokenizer, texts) == sum(map(len, texts)) / tokens
    with pytest.raises(ValueError, match="no text to measure"):
        bytes_per_token(tokenizer, [])


def test_command(tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": ENGLISH * 5}) + "\n", encoding="utf-8")

    def run(*words: str, overrides=()) -> None:
        parser = argparse.ArgumentParser()
        program.add_arguments(parser)
        words = ("--source", str(tmp_path / "text.jsonl"), *words)
        program.main(parser.parse_args(words), list(overrides))

    out = tmp_path / "tokenizer.json"
    run("--vocab", "300", "--out", str(out))
    lines = capsys.readouterr().out.splitlines()
    tokenizer = load_tokens(str(out))
    mean = bytes_per_token(tokenizer, [ENGLISH.encode() * 5])
    assert lines[0] == f"{out}: 300 tokens" and lines[1].startswith(f"{mean:.3f} bytes per token")
    assert lines[3].split() == ["2,048", f"{positions_per_row(2048, mean):,}"]
    assert lines[4].split() == ["8,192", f"{positions_per_row(8192, mean):,}"]
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"--out=.* exists"):
        run("--vocab", "280", "--out", str(out))
    assert out.read_bytes() == before
    other = str(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"--vocab is 9, not >= 258"):
        run("--vocab", "9", "--out", other)
    with pytest.raises(ValueError, match=r"gives \d+ tokens, not 9000"):
        run("--vocab", "9000", "--out", other)
    with pytest.raises(ValueError, match="takes no --config settings"):
        run("--out", other, overrides=["optimizer.lr=1"])
    assert not Path(other).exists()
