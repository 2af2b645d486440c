"""The description of a family's rows: all that `data/` has to know about a model."""

import dataclasses

from bltjax.config.model import Patching

KINDS = ("bytes", "patches", "tokens", "pairs", "characters")


@dataclasses.dataclass(frozen=True)
class PairRows:
    """Rows of pairs: the part of a window that a decoder writes, and room for it.

    objective: spans, masked ones; or prefix, the window's end, split anywhere
    (data/objectives/spans.py).
    """

    window: int  # the longest, in text bytes
    encoder: int  # T: positions of a row
    decoder: int  # N
    objective: str = "spans"
    noise: float = 0.15  # spans: the share of bytes in them
    mean_span: float = 20.0  # spans: bytes


@dataclasses.dataclass(frozen=True)
class CharacterRows:
    """Rows of characters, some masked, and room for them (data/objectives/masks.py)."""

    characters: int  # N
    molecules: int
    predicted: int  # Q; 0: none, since the model has no head for them
    rate: int  # characters of a molecule
    classes: int  # that are predicted: a code point modulo this
    share: float = 0.15  # of the spans that are masked

    @property
    def window(self) -> int:
        """The longest window, in characters of text between CLS and SEP.

        Raises:
          ValueError: with both limits, if a row holds none.
        """
        longest = min(self.characters, (self.molecules + 1) * self.rate - 1) - 2
        if longest < 1:
            raise ValueError(
                f"a row of {self.characters} characters and {self.molecules} molecules has no place"
                " for text: CLS and SEP take 2 characters"
            )
        return longest


@dataclasses.dataclass(frozen=True)
class Rows:
    """The way from documents to rows, by the kind of a family's batches (data/batches.py).

    bytes and patches  a document is BOS, its bytes, EOS, as far as the alphabet has them. Patches
                       have starts; bytes lie on a grid of slots of equal length, which restarts
                       at each document (and after a cut)
    tokens             a document is BOS, its tokens, EOS; a row has `max_patches` positions
    pairs              examples of windows of a document: what an encoder reads, and a decoder
    characters         windows of a document's characters between CLS and SEP, with masks
    """

    kind: str = "bytes"
    patching: Patching | None = None  # of patches
    grid: int = 1  # bytes per slot, of bytes
    alphabet: str = "blt"  # a key of ALPHABETS
    tokenizer: str = ""  # of tokens: a Hugging Face tokenizers file
    vocabulary: int = 0  # of tokens: rows of the embedding
    pairs: PairRows | None = None
    characters: CharacterRows | None = None

    @property
    def of_windows(self) -> bool:
        """Whether a row has windows that are whole, of which an objective made examples, instead of
        documents that it may cut."""
        return self.kind in ("pairs", "characters")

    @property
    def slots_bound(self) -> bool:
        """Whether a row is full with `max_patches` slots, whether or not it has `seq_len` bytes."""
        return self.patching is not None or self.grid > 1 or self.kind in ("tokens", "characters")

    def most_slots(self, seq_len: int, max_patches: int) -> int:
        """The slots of a row: its patches, or its bytes where nothing else is counted."""
        return max_patches if self.slots_bound else seq_len

    def limits(self, seq_len: int, max_patches: int) -> tuple[int, int]:
        """The two limits of a row, which is full with either: of bytes and slots; of positions of
        encoder and decoder; of characters and molecules."""
        if self.kind == "pairs":
            return self.pairs.encoder, self.pairs.decoder
        return self.sizes(seq_len, max_patches)["N"], self.most_slots(seq_len, max_patches)

    @property
    def limit_names(self) -> tuple[str, str]:
        """The names of the two limits, for people."""
        others = {"pairs": ("encoder", "decoder"), "characters": ("characters", "molecules")}
        return others.get(self.kind, ("bytes", "patches"))

    def sizes(self, seq_len: int, max_patches: int) -> dict[str, int]:
        """Sizes of a batch's axes by letter, without B."""
        match self.kind:
            case "pairs":
                return {"T": self.pairs.encoder, "N": self.pairs.decoder}
            case "characters":
                return {"N": seq_len, "Q": self.characters.predicted}
            case "tokens":
                return {"N": max_patches}
        return {"N": seq_len}


BYTE_ROWS = Rows()


def patch_rows(patching: Patching | None) -> Rows:
    """Rows of bytes in our alphabet, with patches or without."""
    return Rows() if patching is None else Rows("patches", patching)
