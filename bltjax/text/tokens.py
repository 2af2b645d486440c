"""Texts as tokens of a Hugging Face tokenizer.json and back, without losing a byte.

A vocabulary spells bytes in one of two ways:

    byte level (Llama 3)      256 printable stand-ins, a letter per byte:  " hé" = Ġ h Ã ©
    byte fallback (Llama 2)   characters, with ▁ for a space and one ▁ before the text; for each
                              byte of any other character a piece <0xNN>:  "hé" = ▁ h <0xC3> <0xA9>

The tokens of a text are those of the `tokenizers` library, with two differences. A text is only
text: names of special tokens in it, such as "<s>", are spelled out. And nothing is lost: bytes that
are not UTF-8, and a ▁ of the text itself where that means a space, are written byte by byte, with
the text before and after each cut into tokens on its own; and characters are not normalised.
"""

import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from bltjax.system.paths import path_of
from bltjax.system.storage import read_json, refuse_pointer
from bltjax.text.alphabet import NO_BYTE
from bltjax.text.bpe import NOT_UTF8
from bltjax.text.tokenizer_file import (
    SPACE,
    adds_space,
    check_normalizer,
    checked,
    identity_of,
    lossless,
    parts_of,
    template_of,
    writes_spaces,
)

NOT_UTF8_OR_SPACE = re.compile(f"([\udc80-\udcff{SPACE}])")
# Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 and following.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
STAND_INS = {chr(byte): byte for byte in PRINTABLE}
STAND_INS |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
# Names of the tokens that open and close a document, unless the file has a template with them.
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
LONGEST = NO_BYTE - 1  # bytes of a token, whose number is a uint8
STEP = 64  # positions of a row are a multiple of it
PROBE = "A  probe: ▁ é日\t\r\n 1234's\0<s>".encode() + b"\xff"


class Tokenizer:
    """A byte-pair tokenizer; `decode` inverts `encode` for any bytes.

    vocabulary: one more than the largest id.
    lengths_V: uint8, the text bytes of each token; 0 for specials and for ids without a token. They
      add up to a text's bytes and, unless it is empty, `added`.
    added: 1 if a space is put before the text, as Llama 2's tokenizer does, else 0.
    bos, eos: ids of the tokens that open and close a document, or None.
    identity: a hash of the file's contents.
    """

    def __init__(self, values: dict, where: str):
        """values: the contents of a tokenizer.json. where: its path, for messages.

        Raises:
          ValueError: if it is no byte-pair tokenizer, can't spell all bytes, or loses some.
        """
        self.where, self.identity = where, identity_of(values)
        values = checked(values, where)
        names = [one["type"] for one in parts_of(values["pre_tokenizer"])]
        rules = parts_of(values["normalizer"]) + parts_of(values["pre_tokenizer"])
        self.byte_level = "ByteLevel" in names
        self.spaced = not self.byte_level and any(map(writes_spaces, rules))
        self.added = int(self.spaced and any(map(adds_space, rules)))
        check_normalizer(values["normalizer"], self.spaced, where)
        self.library = lossless(values)

        specials = {token["content"] for token in values["added_tokens"] if token["special"]}
        specials.add(values["model"]["unk_token"])
        ids: dict[str, int] = dict(values["model"]["vocab"])
        pieces = {number: self.spelled(piece) for piece, number in ids.items()}
        for token in values["added_tokens"]:
            ids[token["content"]] = token["id"]
            pieces[token["id"]] = self.plain(token["content"])
        pieces |= {ids[name]: b"" for name in specials & ids.keys()}
        self.vocabulary = max(pieces) + 1
        self.bytes_V = [pieces.get(number, b"") for number in range(self.vocabulary)]
        longest = max(range(self.vocabulary), key=lambda number: len(self.bytes_V[number]))
        if len(self.bytes_V[longest]) > LONGEST:
            raise ValueError(
                f"{where}: token {longest} has {len(self.bytes_V[longest])} bytes, not {LONGEST} or"
                " fewer"
            )
        self.lengths_V = np.array([len(piece) for piece in self.bytes_V], np.uint8)
        self.byte_ids = self.ids_of_bytes(ids)
        opens, closes = template_of(values["post_processor"])
        self.bos = next((ids[name] for name in (*opens, *BOS) if name in ids), None)
        self.eos = next((ids[name] for name in (*closes, *EOS) if name in ids), None)
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError(f"{where} loses text: {PROBE!r} becomes other bytes")

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.library.encode_special_tokens = True  # which the library's own pickle leaves out

    def plain(self, text: str) -> bytes:
        return (text.replace(SPACE, " ") if self.spaced else text).encode()

    def spelled(self, piece: str) -> bytes:
        """The bytes of a piece of the vocabulary; none for one that no text can have."""
        if self.byte_level:
            known = STAND_INS.keys() >= set(piece)
            return bytes(STAND_INS[letter] for letter in piece) if known else b""
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        return bytes.fromhex(byte[1]) if byte else self.plain(piece)

    def ids_of_bytes(self, ids: dict[str, int]) -> list[int]:
        """The token of each byte alone. Raises ValueError if one has none."""
        names = {byte: letter for letter, byte in STAND_INS.items()}
        if not self.byte_level:
            names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        missing = [names[byte] for byte in range(256) if names[byte] not in ids]
        missing += [SPACE] if self.spaced and SPACE not in ids else []
        if missing:
            raise ValueError(
                f"{self.where} can't spell every text: of the 256 bytes"
                f" {'and the space ' * self.spaced}it has no token for {len(missing)}, the first of"
                f" them {missing[0]!r}"
            )
        return [ids[names[byte]] for byte in range(256)]

    def encode(self, text: bytes) -> np.ndarray:
        """int32 ids of a text, without specials.

        Raises:
          ValueError: if the tokenizer loses some of it, as one with unusual rules may.
        """
        if not text:
            return np.zeros(0, np.int32)
        characters = text.decode(errors="surrogateescape")
        # Runs of text, and between any two of them one character that is written byte by byte.
        pieces = (NOT_UTF8_OR_SPACE if self.spaced else NOT_UTF8).split(characters)
        runs = [" " * self.added + pieces[0], *pieces[2::2]]
        if self.spaced:
            runs = [run.replace(" ", SPACE) for run in runs]
        first, *rest = self.library.encode_batch_fast(runs, add_special_tokens=False)
        ids = first.ids
        for character, run in zip(pieces[1::2], rest, strict=True):
            ids += [self.byte_ids[byte] for byte in character.encode(errors="surrogateescape")]
            ids += run.ids
        ids_N = np.array(ids, np.int32)
        found = int(self.lengths_V[ids_N].sum(dtype=np.int64)) - self.added
        if found != len(text):
            raise ValueError(
                f"{self.where} loses text: the tokens of one of {len(text)} bytes have {found}"
            )
        return ids_N

    def document(self, text: bytes) -> np.ndarray:
        """int32 ids of a document: BOS, those of the text, EOS.

        Raises:
          ValueError: if the tokenizer has no BOS or no EOS, and as `encode`.
        """
        for kind, number, names in (("BOS", self.bos, BOS), ("EOS", self.eos, EOS)):
            if number is None:
                raise ValueError(
                    f"{self.where} has no {kind}: none in its template, and no token named"
                    f" {', '.join(names[:-1])} or {names[-1]}"
                )
        return np.concatenate([[self.bos], self.encode(text), [self.eos]]).astype(np.int32)

    def text_bytes(self, ids_N: np.ndarray) -> np.ndarray:
        """uint8 [N], the text bytes of each token of a document, which add up to the text's.

        The added space is taken from the first token; NO_BYTE stands for none, of a token that is
        the space alone: its nats count, and no byte.
        """
        lengths_N = self.lengths_V[ids_N]
        if self.added and lengths_N.any():
            first = np.argmax(lengths_N > 0)
            lengths_N[first] = lengths_N[first] - 1 or NO_BYTE
        return lengths_N

    def token_bytes(self, number: int) -> bytes:
        """The bytes of a token; none for a special. Raises ValueError as `decode`."""
        return self.joined([number])

    def decode(self, ids) -> bytes:
        """The text of a document's ids, or of its first ones; specials are dropped.

        Raises:
          ValueError: for an id beyond the vocabulary.
        """
        text = self.joined(ids)
        return text.removeprefix(b" ") if self.added else text

    def joined(self, ids) -> bytes:
        ids_N = np.asarray(ids, np.int64)
        wrong_N = ids_N[(ids_N < 0) | (ids_N >= self.vocabulary)]
        if wrong_N.size:
            raise ValueError(
                f"id {wrong_N[0]} is not below the {self.vocabulary} of {self.where}'s vocabulary"
            )
        return b"".join(map(self.bytes_V.__getitem__, ids_N.tolist()))

    def check_model(self, vocabulary: int) -> None:
        """Raises ValueError unless a model's embedding has a row for every token."""
        if self.vocabulary > vocabulary:
            raise ValueError(
                f"{self.where} has ids up to {self.vocabulary - 1}, but llama.vocabulary is"
                f" {vocabulary}: the tokenizer belongs to another model"
            )


@functools.lru_cache(maxsize=8)
def load_tokens(path: str) -> Tokenizer:
    """The tokenizer in a file.

    Raises:
      ValueError: as `Tokenizer`, or if the file is no JSON.
      OSError: if there is no such file.
    """
    file = path_of(path)
    refuse_pointer(file)
    return Tokenizer(read_json(file), str(path))


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[bytes]) -> float:
    """The mean number of text bytes per token. Raises ValueError if there is no text."""
    text_bytes = tokens = 0
    for text in texts:
        text_bytes += len(text)
        tokens += len(tokenizer.encode(text))
    if not tokens:
        raise ValueError("there is no text to measure bytes per token on")
    return text_bytes / tokens


def positions_per_row(row_bytes: int, bytes_per_token: float) -> int:
    """The positions of a row for so many bytes of text, rounded up to a multiple of 64."""
    return STEP * math.ceil(row_bytes / bytes_per_token / STEP)
