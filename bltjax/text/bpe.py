"""Patches at the tokens of a Hugging Face `tokenizers` file: the paper's BPE baseline.

Not incremental: the tokens of a prefix may change with the text that follows, so a model cannot
know its patch starts while it generates (paper 2.4). Use it for training, scoring and pictures.
"""

import functools
import re

import numpy as np

from bltjax.system.storage import refuse_pointer
from bltjax.text.alphabet import OFFSET

NOT_UTF8 = re.compile("([\udc80-\udcff])")  # surrogateescape of such a byte


@functools.lru_cache(maxsize=8)
def load_tokenizer(path: str):
    """The tokenizer, without the length limits that its file may set for a model.

    Raises:
      ValueError: if the file is not a tokenizer.
      OSError: if there is no such file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("bpe patching needs tokenizers: pip install 'bltjax[bpe]'") from None
    refuse_pointer(path)  # raises for a missing file, which its own message would not name
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # it raises plain Exception
        raise ValueError(
            f"{path} is not a tokenizer file of Hugging Face's tokenizers (tokenizer.json): {error}"
        ) from None
    # Truncation and padding tokens are no boundaries of the text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_lengths(path: str, text: bytes) -> list[int]:
    """The length in bytes of each token, in order; the tokens join to the text.

    Tokens of a byte-level tokenizer may end inside a character. With other tokenizers, tokens that
    share a character count as one. A byte that is not UTF-8 is a token of its own.

    Raises:
      ValueError: if the tokenizer can't tokenize the text: some have no token for an unknown word.
    """
    lengths: list[int] = []
    for piece in NOT_UTF8.split(text.decode(errors="surrogateescape")):
        alone = NOT_UTF8.fullmatch(piece)
        lengths += [1] if alone else string_lengths(path, piece)
    return lengths


def string_lengths(path: str, text: str) -> list[int]:
    if not text:
        return []
    tokenizer, size = load_tokenizer(path), len(text.encode())
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # it raises plain Exception
        begin = text if len(text) <= 40 else text[:40] + "..."
        raise ValueError(f"{path} can't cut {begin!r} into tokens: {error}") from None
    exact = [len(token) for token in encoding.tokens]
    if sum(exact) == size and "ByteLevel" in str(tokenizer.pre_tokenizer):
        return exact  # byte-level tokens are written with one letter for each byte
    # Offsets count characters. A token begins where the one before ended; spaces that a tokenizer
    # drops go to the token after them.
    ends = np.maximum.accumulate([0] + [end for _, end in encoding.offsets] + [len(text)])
    bytes_before = np.cumsum([0] + [len(character.encode()) for character in text])
    return [int(n) for n in np.diff(bytes_before[ends]) if n]


def token_starts(path: str, ids_N: np.ndarray) -> np.ndarray:
    """bool [N + 1]: starts at each token of a document, at BOS and EOS, and after the text."""
    starts_N1 = np.ones(len(ids_N) + 1, bool)
    text_N = np.flatnonzero(ids_N >= OFFSET)
    if len(text_N):
        lengths = token_lengths(path, (ids_N[text_N] - OFFSET).astype(np.uint8).tobytes())
        starts_N1[text_N] = False
        starts_N1[text_N[np.cumsum([0, *lengths[:-1]])]] = True
    return starts_N1
