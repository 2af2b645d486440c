"""Token boundaries in bytes, for tokenizers of both kinds and for bytes that are not text."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bltjax.text.alphabet import encode
from bltjax.text.bpe import load_tokenizer, token_lengths, token_starts

TEXT = "the patch begins where the next byte is hard to guess: 日本, 你好 and emoji 😀😀. " * 3


def saved(tmp_path, kind: str) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    path = str(tmp_path / f"{kind}.json")
    tokenizer.save(path)
    return path


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_tokens_join_to_the_text(tmp_path, kind):
    path = saved(tmp_path, kind)
    for text in (TEXT.encode(), b"a", "日".encode(), b"the\xff\xfe next \xe4\xbd", b"  two"):
        lengths = token_lengths(path, text)
        assert sum(lengths) == len(text) and min(lengths) > 0
    assert token_lengths(path, b"") == []
    assert len(token_lengths(path, TEXT.encode())) < len(TEXT) / 1.5  # there are merges


def test_byte_level_tokens_are_exact(tmp_path):
    path = saved(tmp_path, "byte_level")
    tokens = load_tokenizer(path).encode(TEXT).tokens
    assert token_lengths(path, TEXT.encode()) == [len(token) for token in tokens]


def test_starts(tmp_path):
    path = saved(tmp_path, "byte_level")
    ids = encode("the next")
    starts = token_starts(path, ids)
    begins = 1 + np.cumsum([0, *token_lengths(path, b"the next")])
    assert np.flatnonzero(starts).tolist() == [0, *begins.tolist(), len(ids)]
    assert token_starts(path, encode("")).all()


def test_a_files_limits_of_length_cut_nothing(tmp_path):
    """A tokenizer.json often contains the truncation and padding settings of its model."""
    path = saved(tmp_path, "byte_level")
    expected = token_lengths(path, TEXT.encode())
    tokenizer = load_tokenizer(path)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=2000)
    tokenizer.save(str(tmp_path / "limited.json"))
    assert token_lengths(str(tmp_path / "limited.json"), TEXT.encode()) == expected
    assert len(expected) > 8


def test_text_that_a_tokenizer_cannot_cut(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"the": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = str(tmp_path / "words.json")
    tokenizer.save(path)
    assert token_lengths(path, b"the the") == [3, 4]
    with pytest.raises(ValueError, match=r"words.json can't cut 'the next' into tokens: .*UNK"):
        token_lengths(path, b"the next")


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no.json is not a tokenizer file"):
        load_tokenizer(str(tmp_path / "no.json"))
    with pytest.raises(FileNotFoundError):
        load_tokenizer(str(tmp_path / "missing.json"))
