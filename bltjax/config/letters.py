"""The letters that name every axis in this repository, and a check of shapes by letter.

An array is called `noun_LETTERS`: `bytes_BN` is [rows, bytes]; a digit after a letter is added to
it, so `starts_BN1` is [rows, bytes + 1]. The same suffix on a parameter's name yields its sharding.
"""

import re

LETTERS = {
    "B": "rows in the batch",
    "N": "positions in a row: bytes, tokens or characters",
    "P": "patches in a row",
    "K": "slots per patch",
    "S": "slots in a row, flattened (P * K)",
    "D": "width of the latent stack",
    "E": "width of the byte stacks",
    "F": "feed-forward hidden",
    "H": "query heads, latent",
    "G": "query heads, byte stacks and byte LM",
    "J": "key/value heads",
    "C": "channels per head",
    "V": "alphabet (260), or a vocabulary of tokens",
    "M": "rows of one hash table",
    "R": "hash tables",
    "L": "stacked layers",
    "A": "places: bytes of a fixed patch, characters of a molecule, taps of a convolution",
    "I": "inner channels (MambaByte)",
    "U": "states per channel (MambaByte)",
    "Z": "rank of the step (MambaByte)",
    "Y": "width of a byte in the global stack (MegaByte)",
    "W": "entries of a small table: buckets of distances, types of characters",
    "Q": "queries (attention), predicted positions",
    "T": "keys (attention), positions of an encoder",
}


def suffix_axes(name: str) -> tuple[tuple[str, int], ...]:
    """`starts_BN1` -> (("B", 0), ("N", 1)): the letters of a name and the number added to each."""
    tail = name.rpartition("_")[2]
    axes = re.findall(r"([A-Z])(\d*)", tail)
    if "".join(letter + extra for letter, extra in axes) != tail or not axes:
        raise ValueError(f"{name!r} does not end in shape letters such as _BN")
    unknown = [letter for letter, _ in axes if letter not in LETTERS]
    if unknown:
        raise ValueError(f"{name!r} has letters that mean nothing here: {', '.join(unknown)}")
    return tuple((letter, int(extra or 0)) for letter, extra in axes)


def check_shapes(**arrays) -> dict[str, int]:
    """Sizes by letter, after checking that arrays named by their suffix agree.

    `check_shapes(bytes_BN=x, starts_BN1=s)["N"]` is the row length.

    Raises:
      ValueError: naming the array, its letters, and the two sizes that differ.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, array in arrays.items():
        axes = suffix_axes(name)
        if len(axes) != array.ndim:
            raise ValueError(f"{name} has {len(axes)} letters but shape {tuple(array.shape)}")
        for (letter, extra), size in zip(axes, array.shape, strict=True):
            size -= extra
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{letter} ({LETTERS[letter]}) is {size} in {name}"
                    f" but {sizes[letter]} in {owner[letter]}"
                )
            owner.setdefault(letter, name)
    return sizes
