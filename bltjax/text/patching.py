"""Patch starts from scores, in every mode, written once for numpy and jax.numpy arrays.

Starts cover N + 1 positions: the last one says whether the byte after the text opens a patch. All
modes but bpe are incremental (paper 2.4): the starts of a prefix are the prefix of the starts.
They reproduce the reference, side effects included; a comment marks each quirk.

Every rule is one elementwise function. `trace_starts` applies it to all positions of a text at
once; `next_starts` applies it to one more position of rows that are being generated.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.config.model import Patching
from bltjax.text.alphabet import BOE, OFFSET
from bltjax.text.bpe import token_starts


class Trace(NamedTuple):
    """Starts of a whole text and, for each position, the state that later starts depend on.

    An entry that the config does not use is None.
    """

    starts_N1: Any
    began_N1: Any  # the last start up to here, before long patches are split
    waits: Any  # starts waiting for the end of a character: after the mode's rule, after splitting


class Cursor(NamedTuple):
    """State at the end of each row's trace, from which `next_starts` continues."""

    index_B: jax.Array  # the last decided position
    entropy_B: jax.Array  # known before it
    began_B: jax.Array | None
    waits: Any


def patch_starts(config: Patching, ids_N, entropies_N=None):
    """bool [..., N + 1]: the patch starts of one document.

    ids_N: ids from the document's first position on. entropies_N: float32 nats; entry j is the
    entropy of the byte after x[:j + 1]. Only the entropy mode reads it.

    Raises:
      ValueError: if the mode needs entropies and they are missing or have another length; for bpe
        mode on a device, where there is no tokenizer, or with several documents at once.
    """
    return trace_starts(config, ids_N, entropies_N).starts_N1


def document_starts(config: Patching, ids_N, entropies: np.ndarray | None) -> np.ndarray:
    """bool [N + 1]: the patch starts of a whole document, as rows have them; on the host.

    The first two positions are always starts, and so is the one after EOS: another document's BOS.

    ids_N: BOS, bytes, EOS. entropies: float32 [N - 1]; the position after EOS is never predicted.

    Raises:
      ValueError: as `patch_starts`.
    """
    padded_N = None
    if config.mode == "entropy":
        if entropies is None:
            raise ValueError("entropy patching needs scored documents; run the entropies command")
        if len(entropies) != len(ids_N) - 1:
            raise ValueError(
                f"a document of {len(ids_N) - 2} bytes has {len(entropies)} entropies, not"
                f" {len(ids_N) - 1}: of every byte and of its end"
            )
        check_finite(entropies)
        if config.above_threshold:
            # The rule of most runs, in the one pass that it needs: the general path's ten passes
            # take a sixth of the time of making rows.
            starts_N1 = np.ones(len(ids_N) + 1, bool)
            np.greater(entropies[1:], np.float32(config.threshold), out=starts_N1[2:-1])
            return starts_N1
        padded_N = np.zeros(len(ids_N), np.float32)
        padded_N[:-1] = entropies
    starts_N1 = force_starts(patch_starts(config, ids_N, padded_N))
    starts_N1[-1] = True
    return starts_N1


def check_finite(entropies_N: np.ndarray) -> None:
    """Raises ValueError, with the position, for an entropy that is not finite: a NaN would silently
    never start a patch."""
    finite_N = np.isfinite(entropies_N)
    if not finite_N.all():
        position = np.argwhere(~finite_N)[0]
        raise ValueError(
            f"the entropy after the first {position[-1]} bytes of a document is"
            f" {entropies_N[tuple(position)]}, which places no patches: score the document again,"
            " with a byte LM whose parameters are finite"
        )


def trace_starts(config: Patching, ids_N, entropies_N=None) -> Trace:
    """`patch_starts`, together with the state that `next_starts` needs at any position."""
    xp = jnp if isinstance(ids_N, jax.Array) else np
    length = ids_N.shape[-1]
    index_N1 = xp.arange(length + 1, dtype=xp.int32)
    if ids_N.ndim > 1:
        index_N1 = xp.broadcast_to(index_N1, (*ids_N.shape[:-1], length + 1))
    past = []
    if config.mode == "space" or config.whole_characters:
        past = [shifted(xp, ids_N, by, BOE) for by in (1, 2, 3)]
    if config.mode == "bpe":
        if xp is jnp:
            raise ValueError("bpe patching tokenizes the whole text on the host: give numpy ids")
        if ids_N.ndim != 1:
            raise ValueError(f"bpe patching takes one document, ids [N], not {ids_N.shape}")
        starts_N1 = token_starts(config.tokenizer, ids_N)
    else:
        now_N1 = before_N1 = None
        if config.mode == "entropy":
            if entropies_N is None or entropies_N.shape != ids_N.shape:
                found = "none" if entropies_N is None else tuple(entropies_N.shape)
                raise ValueError(
                    f"entropy patching needs one entropy per position: ids are"
                    f" {tuple(ids_N.shape)}, entropies {found}"
                )
            if xp is np:
                check_finite(entropies_N)
            entropies_N = entropies_N.astype(xp.float32, copy=False)
            now_N1 = shifted(xp, entropies_N, 1, 0.0)
            if config.monotonic or config.threshold_add is not None:
                before_N1 = shifted(xp, entropies_N, 2, 0.0)
        starts_N1 = opens(xp, config, index_N1, past, now_N1, before_N1)
    inside_N1 = inside_character(xp, past) if config.whole_characters else None
    began_N1, waits = None, ()
    if config.whole_characters:
        starts_N1, waiting = after_character(xp, starts_N1, inside_N1)
        waits += (waiting,)
    if config.max_patch_bytes is not None:
        began_N1 = xp.where(starts_N1, index_N1, 0)
        if xp is np:
            began_N1 = np.maximum.accumulate(began_N1, axis=-1)
        else:
            began_N1 = jax.lax.cummax(began_N1, axis=began_N1.ndim - 1)
        starts_N1 = starts_N1 | too_long(config, index_N1, began_N1)
        if config.whole_characters:
            starts_N1, waiting = after_character(xp, starts_N1, inside_N1)
            waits += (waiting,)
    if not config.looks_past_end and config.max_patch_bytes is not None:
        starts_N1 = starts_N1 & (index_N1 < length)
    return Trace(starts_N1, began_N1, waits)


def cursor_at(trace: Trace, entropies_BN, index_B) -> Cursor:
    """The cursor of rows whose last decided position is `index`; entropies_BN may be None."""

    def at(x_BN, index_B):
        return jnp.take_along_axis(x_BN, index_B[:, None], axis=1)[:, 0]

    began_B, waits = jax.tree.map(lambda x_BN1: at(x_BN1, index_B), (trace.began_N1, trace.waits))
    entropy_B = jnp.zeros(index_B.shape) if entropies_BN is None else at(entropies_BN, index_B - 1)
    return Cursor(index_B, entropy_B, began_B, waits)


def next_starts(config: Patching, cursor: Cursor, past_BT, entropies_B):
    """bool [B], whether the position after the cursor's opens a patch, and the cursor there.

    past_BT: each row's last three ids or more, the newest last, BOE before the document.
    entropies_B: nats, after the newest id; ignored by modes that don't use entropies.
    """
    index_B = cursor.index_B + 1
    past = [past_BT[:, -by] for by in (1, 2, 3)]
    starts_B = opens(jnp, config, index_B, past, entropies_B, cursor.entropy_B)
    inside_B = inside_character(jnp, past) if config.whole_characters else None
    began_B, before, waits = cursor.began_B, iter(cursor.waits), ()
    if config.whole_characters:
        starts_B, waiting = wait_for_end(starts_B, inside_B, next(before))
        waits += (waiting,)
    if config.max_patch_bytes is not None:
        began_B = jnp.where(starts_B, index_B, began_B)
        starts_B = starts_B | too_long(config, index_B, began_B)
        if config.whole_characters:
            starts_B, waiting = wait_for_end(starts_B, inside_B, next(before))
            waits += (waiting,)
    return starts_B, Cursor(index_B, entropies_B, began_B, waits)


def opens(xp, config: Patching, index, past, now, before):
    """Whether position `index` opens a patch by the rule of the mode alone; elementwise.

    past: ids 1, 2 and 3 positions earlier. now, before: the entropies known before this position
    and before the one before it, which only the relative modes read.
    """
    if config.mode == "byte":
        return index >= 0
    if config.mode == "static":
        # The reference's first patch is as long as the others; rows force a start at 1 later.
        return index % config.patch_bytes == 0
    if config.mode == "space":
        return (index < 2) | space_ended(xp, past[0], past[1])
    return (index < 2) | entropy_opens(xp, config, index, now, before)


def shifted(xp, x_N, by: int, fill):
    """x[t - by] at t of N + 1 positions, `fill` where there is none."""
    length = x_N.shape[-1] + 1
    kept_N = x_N[..., : max(0, length - by)]
    if xp is np:  # with a single copy
        moved_N1 = np.empty((*x_N.shape[:-1], length), x_N.dtype)
        moved_N1[..., :by], moved_N1[..., by:] = fill, kept_N
        return moved_N1
    before = xp.full((*x_N.shape[:-1], by), fill, x_N.dtype)
    return xp.concatenate([before, kept_N], axis=-1)[..., :length]


def entropy_opens(xp, config: Patching, index, now, before):
    """Whether positions from 2 on are starts; H[0], the entropy after BOS, is ignored.

    The values at positions 0 and 1 don't matter: these open patches anyway.
    """
    high = now > xp.float32(config.threshold)
    if not config.monotonic and config.threshold_add is None:
        return high
    rise = now - before  # H[t - 1] - H[t - 2]
    # Both relative modes force a start at 2: the reference fills the first entry of a shortened
    # vector with True, having nothing to compare it with.
    if config.monotonic:
        return (index == 2) | ((rise > xp.float32(config.threshold)) & (index >= 3))
    high = high & (rise > xp.float32(config.threshold_add))
    # "And the previous is no start" was evaluated before the starts were filled in, so it only ever
    # blocks the position after the forced one.
    return (index == 2) | (high & (index >= 4))


def space_ended(xp, last, before):
    """A patch ends with the first space-like byte after one that isn't; specials always end one.

    Space-like: all but ASCII letters and digits and UTF-8 continuation bytes; so UTF-8 lead bytes
    are space-like, and specials, whose byte value is negative, too.
    """

    def is_word(ids):
        byte = ids.astype(xp.int32) - OFFSET
        word = ((byte >= 48) & (byte <= 57)) | ((byte >= 65) & (byte <= 90))
        return word | ((byte >= 97) & (byte <= 122)) | ((byte >= 0x80) & (byte <= 0xBF))

    return (~is_word(last) & is_word(before)) | (last < OFFSET)


def too_long(config: Patching, index, began):
    """Cuts every patch into pieces of `max_patch_bytes` from its left end."""
    return (index - began) % config.max_patch_bytes == 0


def inside_character(xp, past):
    """Whether the bytes before a position leave a UTF-8 character unfinished.

    It reads nothing from the position on. Where a continuation byte is missing, the position after
    the break is no longer inside.
    """
    inside, unbroken = False, True
    for distance, ids in enumerate(past, start=1):
        byte = ids.astype(xp.int32) - OFFSET
        size = 1 + (byte >= 0xC2).astype(xp.int32) + (byte >= 0xE0) + (byte >= 0xF0)
        unfinished = xp.where(byte > 0xF4, 1, size) > distance
        inside = inside | (unfinished & unbroken)
        unbroken = unbroken & (byte >= 0x80) & (byte <= 0xBF)
    return inside


def wait_for_end(starts, inside, waits):
    """Moves a start inside a character to its end, by at most three positions.

    waits: the starts that have already been moved by 0, 1 and 2 positions at the position before.
    """
    result = (starts | waits[0] | waits[1] | waits[2]) & ~inside
    return result, (starts & inside, waits[0] & inside, waits[1] & inside)


def after_character(xp, starts_N1, inside_N1):
    """`wait_for_end` for all positions: the starts, and the waiting starts at each."""
    waits = [starts_N1 & inside_N1]
    before = [shifted(xp, waits[0], 1, False)[..., :-1]]
    for _ in range(2):
        waits.append(before[-1] & inside_N1)
        before.append(shifted(xp, waits[-1], 1, False)[..., :-1])
    return wait_for_end(starts_N1, inside_N1, before)[0], tuple(waits)


def force_starts(starts_N1):
    """The first two positions open patches: of every document (BOS is its own) and every row."""
    xp = jnp if isinstance(starts_N1, jax.Array) else np
    first_N1 = xp.arange(starts_N1.shape[-1]) < 2
    return starts_N1 | xp.broadcast_to(first_N1, starts_N1.shape)


def patch_lengths(starts_N1) -> np.ndarray:
    """Lengths of the patches of one row of starts, the last one ending with the row."""
    begins = np.flatnonzero(np.asarray(starts_N1))
    return np.diff(np.append(begins, np.asarray(starts_N1).shape[-1]))
