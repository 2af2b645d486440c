"""The description of a family's rows: all that `data/` has to know about a model."""

import dataclasses

from bltjax.config.model import Patching

KINDS = ("bytes", "patches", "tokens", "pairs", "characters")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The way from documents to rows, by the kind of a family's batches (data/batches.py).

    bytes and patches  a document is BOS, its bytes, EOS, as far as the alphabet has them. Patches
                       have starts; bytes lie on a grid of slots of equal length, which begins anew
                       with each document (and after a cut)
    tokens             a document is BOS, its tokens, EOS; a row has `max_patches` positions
    """

    kind: str = "bytes"
    patching: Patching | None = None  # of patches
    grid: int = 1  # bytes per slot, of bytes
    alphabet: str = "blt"  # a key of ALPHABETS
    tokenizer: str = ""  # of tokens: a Hugging Face tokenizers file
    vocabulary: int = 0  # of tokens: rows of the embedding

    @property
    def slots_bound(self) -> bool:
        """Whether a row is full with `max_patches` slots, whether or not it has `seq_len` bytes."""
        return self.patching is not None or self.grid > 1 or self.kind == "tokens"

    def most_slots(self, seq_len: int, max_patches: int) -> int:
        """The slots of a row: its patches, or its bytes where nothing else is counted."""
        return max_patches if self.slots_bound else seq_len

    def sizes(self, seq_len: int, max_patches: int) -> dict[str, int]:
        """Sizes of a batch's axes by letter, without B."""
        return {"N": max_patches if self.kind == "tokens" else seq_len}


BYTE_ROWS = Rows()


def patch_rows(patching: Patching | None) -> Rows:
    """Rows of bytes in our alphabet, with patches or without."""
    return Rows() if patching is None else Rows("patches", patching)
