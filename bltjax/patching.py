"""Scores -> patch starts, in every mode, written once for numpy and jax.numpy arrays.

Starts cover N + 1 positions: the last says whether the byte not yet seen opens a patch. All modes
but bpe are incremental (paper 2.4): the starts of a prefix are the prefix of the starts. They
reproduce the reference, side effects included; each quirk is named where it is made.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.alphabet import OFFSET
from bltjax.bpe import token_starts
from bltjax.config import PatchingConfig


def patch_starts(config: PatchingConfig, ids_N, entropies_N=None):
    """bool [..., N + 1]: where patches of one document begin.

    ids_N: ids from the document's first position on. entropies_N: float32 nats, entry j of the
    byte after x[:j + 1]; only the entropy mode reads it.

    Raises:
      ValueError: if the entropies that the mode needs are missing or of another length; for bpe
        mode on a device, where there is no tokenizer, or with several documents at once.
    """
    xp = jnp if isinstance(ids_N, jax.Array) else np
    length = ids_N.shape[-1]
    index_N1 = xp.broadcast_to(xp.arange(length + 1), (*ids_N.shape[:-1], length + 1))
    if config.mode == "byte":
        starts_N1 = index_N1 >= 0
    elif config.mode == "static":
        # The reference's first patch is as long as the others; rows force a start at 1 later.
        starts_N1 = index_N1 % config.patch_bytes == 0
    elif config.mode == "bpe":
        if xp is jnp:
            raise ValueError("bpe patching tokenizes the whole text on the host: give numpy ids")
        if ids_N.ndim != 1:
            raise ValueError(f"bpe patching takes one document, ids [N], not {ids_N.shape}")
        starts_N1 = token_starts(config.tokenizer, ids_N)
    elif config.mode == "space":
        starts_N1 = (index_N1 < 2) | space_starts(xp, ids_N)
    else:
        if entropies_N is None or entropies_N.shape != ids_N.shape:
            found = "none" if entropies_N is None else tuple(entropies_N.shape)
            raise ValueError(
                f"entropy patching needs one entropy per position: ids are {tuple(ids_N.shape)},"
                f" entropies {found}"
            )
        starts_N1 = (index_N1 < 2) | entropy_starts(xp, config, entropies_N, index_N1)
    inside_N1 = inside_character(xp, ids_N) if config.whole_characters else None
    if config.whole_characters:
        starts_N1 = after_character(xp, starts_N1, inside_N1)
    if config.max_patch_bytes is not None:
        starts_N1 = split_long(xp, starts_N1, index_N1, config.max_patch_bytes)
        if config.whole_characters:
            starts_N1 = after_character(xp, starts_N1, inside_N1)
    if not config.looks_past_end and config.max_patch_bytes is not None:
        starts_N1 = starts_N1 & (index_N1 < length)
    return starts_N1


def shifted(xp, x_N, by: int, fill):
    """x[t - by] at t of N + 1 positions, `fill` where there is none."""
    before = xp.full((*x_N.shape[:-1], by), fill, x_N.dtype)
    kept_N = x_N[..., : max(0, x_N.shape[-1] + 1 - by)]
    return xp.concatenate([before, kept_N], axis=-1)[..., : x_N.shape[-1] + 1]


def entropy_starts(xp, config: PatchingConfig, entropies_N, index_N1):
    """Starts from position 2 on; H[0], the uncertainty after BOS, is never consulted."""
    entropies_N = entropies_N.astype(xp.float32)
    now_N1 = shifted(xp, entropies_N, 1, xp.inf)  # H[t - 1]
    if not config.monotonic and config.threshold_add is None:
        return (now_N1 > xp.float32(config.threshold)) & (index_N1 >= 2)
    padded = shifted(xp, entropies_N, 1, 0.0)
    rise_N1 = padded - shifted(xp, padded[..., :-1], 1, 0.0)  # H[t - 1] - H[t - 2]
    # Both relative modes force a start at 2: the reference fills the first entry of a shortened
    # vector with True, having nothing to compare it with.
    if config.monotonic:
        return (index_N1 == 2) | ((rise_N1 > xp.float32(config.threshold)) & (index_N1 >= 3))
    high_N1 = (now_N1 > xp.float32(config.threshold)) & (rise_N1 > xp.float32(config.threshold_add))
    # "And the previous is no start" was evaluated before the starts were filled in, so it only ever
    # blocks the position after the forced one.
    return (index_N1 == 2) | (high_N1 & (index_N1 >= 4))


def space_starts(xp, ids_N):
    """A patch ends with the first space-like byte after one that isn't; specials always end one.

    Space-like: all but ASCII letters and digits and UTF-8 continuation bytes; so UTF-8 lead bytes
    are space-like, and specials, whose byte value is negative, too.
    """
    byte_N = ids_N.astype(xp.int32) - OFFSET
    word_N = ((byte_N >= 48) & (byte_N <= 57)) | ((byte_N >= 65) & (byte_N <= 90))
    word_N = word_N | ((byte_N >= 97) & (byte_N <= 122)) | ((byte_N >= 0x80) & (byte_N <= 0xBF))
    previous_N = shifted(xp, word_N, 1, False)[..., :-1]
    ends_N = (~word_N & previous_N) | (byte_N < 0)
    # Position 0 never ends a patch that matters: 1 is a start anyway.
    return shifted(xp, ends_N, 1, False)


def split_long(xp, starts_N1, index_N1, longest: int):
    """Cuts every patch into pieces of `longest` from its left end."""
    begins_N1 = xp.where(starts_N1, index_N1, 0)
    if xp is np:
        begins_N1 = np.maximum.accumulate(begins_N1, axis=-1)
    else:
        begins_N1 = jax.lax.cummax(begins_N1, axis=begins_N1.ndim - 1)
    return starts_N1 | ((index_N1 - begins_N1) % longest == 0)


def inside_character(xp, ids_N):
    """bool [..., N + 1]: whether the bytes before a position leave a UTF-8 character unfinished.

    It looks at nothing from the position on. Where a lead byte's promise is broken, the position
    after the break is no longer inside.
    """
    byte_N = ids_N.astype(xp.int32) - OFFSET
    follows_N = (byte_N >= 0x80) & (byte_N <= 0xBF)
    size_N = 1 + (byte_N >= 0xC2).astype(xp.int32) + (byte_N >= 0xE0) + (byte_N >= 0xF0)
    size_N = xp.where(byte_N > 0xF4, 1, size_N)
    inside_N1, unbroken_N1 = False, True
    for distance in (1, 2, 3):
        begun_N1 = shifted(xp, size_N, distance, 1) > distance
        inside_N1 = inside_N1 | (begun_N1 & unbroken_N1)
        unbroken_N1 = unbroken_N1 & shifted(xp, follows_N, distance, False)
    return inside_N1


def after_character(xp, starts_N1, inside_N1):
    """Moves each start inside a character to the character's end."""
    result_N1, pending_N1 = starts_N1, starts_N1 & inside_N1
    for _ in range(3):  # a character has at most three positions inside
        pending_N1 = shifted(xp, pending_N1, 1, False)[..., :-1]
        result_N1 = result_N1 | pending_N1
        pending_N1 = pending_N1 & inside_N1
    return result_N1 & ~inside_N1


def force_starts(starts_N1):
    """The first two positions open patches: of every document (BOS is its own) and every row."""
    xp = jnp if isinstance(starts_N1, jax.Array) else np
    return starts_N1 | (xp.arange(starts_N1.shape[-1]) < 2)


def patch_lengths(starts_N1) -> np.ndarray:
    """Lengths of the patches of one row of starts, the last one ending with the row."""
    begins = np.flatnonzero(np.asarray(starts_N1))
    return np.diff(np.append(begins, np.asarray(starts_N1).shape[-1]))
