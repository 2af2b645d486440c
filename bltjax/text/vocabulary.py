"""A model's ids: of bytes in an alphabet, of tokens, or of characters. Text becomes ids, and ids
text, here."""

import functools
from collections.abc import Sequence

import numpy as np

from bltjax.text.alphabet import ALPHABETS, Alphabet, as_bytes, decode, encode
from bltjax.text.characters import (
    CLS,
    SEP,
    character_bytes,
    document_characters,
    is_special,
    text_of,
)
from bltjax.text.tokens import load_tokens


class Vocabulary:
    """Ids of bytes.

    alphabet: the ids as a decoder knows them.
    """

    added = 0  # bytes that are put before a text

    def __init__(self, alphabet: Alphabet):
        self.alphabet = alphabet

    def document(self, text: np.ndarray) -> np.ndarray:
        """Ids of a whole text, uint8 [len]: BOS, the text's, EOS, as far as there are such."""
        return encode(text, dtype=np.int16, alphabet=self.alphabet)

    def prompt(self, text: str | bytes) -> np.ndarray:
        """int32 ids of a text's beginning, after BOS if there is one.

        Raises:
          ValueError: for an empty text where there is no BOS.
        """
        data = as_bytes(text)
        if not data and self.alphabet.bos is None:
            raise ValueError("this model has no BOS, so it can't begin a text: give a prompt")
        return encode(data, eos=False, alphabet=self.alphabet)

    @property
    def unpredicted(self) -> str:
        """The part of each document that no figure counts, in words; "" for none."""
        return (
            "" if self.alphabet.bos is not None else "each document's first byte (no BOS is read)"
        )

    def decode(self, ids) -> bytes:
        """The text of ids; specials have none."""
        return decode(ids, alphabet=self.alphabet)

    def text_bytes(self, ids_N: np.ndarray) -> np.ndarray:
        """uint8 [N]: the bytes of text that each id of a document stands for."""
        return self.alphabet.is_text(ids_N).astype(np.uint8)

    def stop_ids(self, text: bytes) -> np.ndarray | None:
        """The ids that a text always ends with if it ends with these bytes; None if there is no
        such rule."""
        return encode(text, bos=False, eos=False, alphabet=self.alphabet)


class TokenVocabulary(Vocabulary):
    """Ids of a tokenizer's tokens."""

    def __init__(self, path: str, size: int):
        """path: of a tokenizer.json. size: rows of the model's embedding.

        Raises:
          ValueError: if the tokenizer has no BOS or EOS, or more ids than the embedding has rows.
        """
        self.tokenizer = load_tokens(path)
        self.tokenizer.check_model(size)
        self.tokenizer.document(b"")  # its errors come now
        self.added = self.tokenizer.added
        # Specials, and rows of the embedding beyond the tokenizer's ids.
        lengths_V = np.zeros(size, np.uint8)
        lengths_V[: self.tokenizer.vocabulary] = self.tokenizer.lengths_V
        silent = tuple(np.flatnonzero(lengths_V == 0).tolist())
        super().__init__(Alphabet(size, 0, self.tokenizer.bos, self.tokenizer.eos, size, silent))

    def document(self, text: np.ndarray) -> np.ndarray:
        return self.tokenizer.document(text.tobytes())

    def prompt(self, text: str | bytes) -> np.ndarray:
        return self.tokenizer.document(as_bytes(text))[:-1]

    def decode(self, ids) -> bytes:
        return self.tokenizer.joined(ids)

    def text_bytes(self, ids_N: np.ndarray) -> np.ndarray:
        return self.tokenizer.text_bytes(ids_N)

    def stop_ids(self, text: bytes) -> None:
        return None


class CharacterVocabulary(Vocabulary):
    """Code points, between CLS and SEP."""

    def __init__(self):
        super().__init__(Alphabet(0x110000, 1, CLS, SEP, 0x110000 - 1))

    def document(self, text: np.ndarray) -> np.ndarray:
        return document_characters(text.tobytes())

    def prompt(self, text: str | bytes) -> np.ndarray:
        return document_characters(as_bytes(text))[:-1]

    def decode(self, ids) -> bytes:
        return text_of(ids)

    def text_bytes(self, ids_N: np.ndarray) -> np.ndarray:
        return np.where(is_special(ids_N), 0, character_bytes(ids_N)).astype(np.uint8)

    def stop_ids(self, text: bytes) -> None:
        return None


CHARACTERS = CharacterVocabulary()


@functools.lru_cache(maxsize=16)
def vocabulary_of(alphabet: str, tokenizer: str = "", size: int = 0) -> Vocabulary:
    """The vocabulary of an alphabet's name; or, if given, of a tokenizer's file."""
    if tokenizer:
        return TokenVocabulary(tokenizer, size)
    return Vocabulary(ALPHABETS[alphabet])


def first_bytes(lengths: Sequence[int]) -> np.ndarray:
    """The place of each token's first byte in the text of all; tokens without bytes have none."""
    lengths = np.asarray(lengths, np.int64)
    return (np.cumsum(lengths) - lengths)[lengths > 0]
