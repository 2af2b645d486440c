"""KV caches for incremental decoding: a ring for bytes, a list for patches.

Bytes see a window, so their cache is a ring: position n lies in slot n % T, and a fixed number of
slots serves texts of any length. Patches see all patches before them: patch p lies in slot p.

    ring, T = 8, W = 6      slot      0   1   2   3   4   5   6   7
    after position 10       position  8   9  10   3   4   5   6   7
    position 11 sees itself and       x   x   x               x   x

New positions attend to the old cache and to themselves; only then are they `stored`, in place.
Writing first and reading afterwards would copy the whole cache, several times per step of one row.

Keys are stored after rotation. In a ring the angles are those of `endless_angles`, exact at any
distance from the text's start. Slots that no position has reached, or whose positions were taken
back, are masked, so nothing has to be cleared.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.attention.dense import masked_softmax
from bltjax.attention.rope import RopeScalingConfig, endless_angles, rotary_angles, rotate


class Cache(NamedTuple):
    """Rotated keys and values by slot; heads first, so that a step's products are plain."""

    k_BJTC: jax.Array
    v_BJTC: jax.Array


class CachePositions(NamedTuple):
    """The next positions of each row: their slots, masks and rotary angles.

    mask_BQT: the mask over the cache's slots, then over the new positions themselves.
    """

    slot_BQ: jax.Array
    mask_BQT: jax.Array
    angles: tuple[jax.Array, jax.Array]


def ring_positions(last_B, slots: int):
    """int32 [B, T]: the newest position up to `last` in each slot; negative for none."""
    last_B1 = last_B[:, None]
    return last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots


def ring_cache_positions(
    count_B, begin_BQ, slots: int, window: int, channels: int, theta: float
) -> CachePositions:
    """`CachePositions` of those from `count` on; each sees `window` positions, none before `begin`.

    The ring needs W + Q - 1 slots. With fewer, positions that are taken back would have overwritten
    keys that the first of them still needs when it is run again.
    """
    queries = begin_BQ.shape[1]
    if slots < window + queries - 1:
        raise ValueError(
            f"a ring of {slots} slots is too small for {queries} positions that see {window} each"
        )
    position_BQ = count_B[:, None] + jnp.arange(queries)[None]
    held_BT = jnp.concatenate([ring_positions(count_B - 1, slots), position_BQ], axis=1)
    oldest_BQ1 = jnp.maximum(position_BQ - window + 1, begin_BQ)[..., None]
    mask_BQT = (held_BT[:, None] >= oldest_BQ1) & (held_BT[:, None] <= position_BQ[..., None])
    return CachePositions(
        position_BQ % slots, mask_BQT, endless_angles(position_BQ, channels, theta)
    )


def list_cache_positions(
    index_BQ, slots: int, channels: int, theta: float, scaling: RopeScalingConfig | None = None
) -> CachePositions:
    """`CachePositions` of consecutive positions in caches that are lists: position i in slot i.

    Each sees those before the first of these, and these up to itself: the text is one document.
    """
    before_B1T = jnp.arange(slots)[None, None] < index_BQ[:, :1, None]
    before_BQT = jnp.broadcast_to(before_B1T, (*index_BQ.shape, slots))
    own_BQQ = index_BQ[:, None] <= index_BQ[..., None]
    return CachePositions(
        jnp.minimum(index_BQ, slots - 1),
        jnp.concatenate([before_BQT, own_BQQ], axis=2),
        rotary_angles(index_BQ, channels, theta, scaling),
    )


def list_of(
    new_kv, position_BT, theta: float, scaling: RopeScalingConfig | None = None
) -> tuple[Cache, ...]:
    """Lists of the keys and values of whole rows, position i in slot i; keys come unrotated."""

    def cache_of(k_BTJC, v_BTJC):
        angles = rotary_angles(position_BT, k_BTJC.shape[-1], theta, scaling)
        return Cache(rotate(k_BTJC, angles).swapaxes(1, 2), v_BTJC.swapaxes(1, 2))

    return tuple(cache_of(*kv) for kv in new_kv)


def longer(caches, slots: int) -> tuple[Cache, ...]:
    """The caches, padded to `slots` slots if they have fewer."""

    def padded(x_BJTC):
        return jnp.pad(x_BJTC, ((0, 0), (0, 0), (0, max(0, slots - x_BJTC.shape[2])), (0, 0)))

    return jax.tree.map(padded, tuple(caches))


def with_new_kv(caches, new_kv, slot_BQ) -> tuple[Cache, ...]:
    """The caches with new keys and values, (k, v) [B, Q, J, C] for each, in their slots."""

    def write(old_JTC, new_QJC, slot_Q):
        if slot_Q.shape[0] == 1:  # in place, where a scatter would be a loop
            new_JQC, slot = new_QJC.transpose(1, 0, 2), slot_Q[0].astype(jnp.int32)
            return jax.lax.dynamic_update_slice(old_JTC, new_JQC, (np.int32(0), slot, np.int32(0)))
        return old_JTC.at[:, slot_Q].set(new_QJC.transpose(1, 0, 2), unique_indices=True)

    def each_row(old_BJTC, new_BQJC):
        new_BQJC = new_BQJC.astype(old_BJTC.dtype)
        if old_BJTC.shape[0] == 1:
            return write(old_BJTC[0], new_BQJC[0], slot_BQ[0])[None]
        return jax.vmap(write)(old_BJTC, new_BQJC, slot_BQ)

    return tuple(Cache(*map(each_row, cache, kv)) for cache, kv in zip(caches, new_kv, strict=True))


def stored(caches, new_kv, slot_BQ, after) -> tuple[Cache, ...]:
    """The caches of a stack, updated by `with_new_kv` once all of its layers have read them.

    after: the output of the stack. XLA writes in place only if every read of the old values
    provably comes first, so the slot indices are made to depend on this output.
    """
    slots = caches[0].k_BJTC.shape[2]
    no_bound = jnp.where(after.ravel()[0] > 0, slots, slots + 1)
    return with_new_kv(caches, new_kv, jnp.minimum(slot_BQ, no_bound))


def ring_of(k_BNJC, v_BNJC, length_B, slots: int, theta: float) -> Cache:
    """The ring of rows whose first `length` positions were run at once; keys come unrotated."""
    position_BT = ring_positions(length_B - 1, slots)

    def picked(x_BNJC):
        index_BT11 = jnp.maximum(position_BT, 0)[..., None, None]
        return jnp.take_along_axis(x_BNJC, index_BT11, axis=1)

    angles = endless_angles(position_BT, k_BNJC.shape[-1], theta)
    k_BTJC, v_BTJC = rotate(picked(k_BNJC), angles), picked(v_BNJC)
    return Cache(k_BTJC.transpose(0, 2, 1, 3), v_BTJC.transpose(0, 2, 1, 3))


def cached_attention(q_BQHC, cache: Cache, mask_BQT, new_kv=None):
    """softmax(q k / sqrt(C)) v over the slots in each query's mask; zeros where it is empty.

    new_kv: (k, v) [B, Q, J, C] of the queries' own positions, which follow the cache.
    """
    rows, queries, heads, channels = q_BQHC.shape
    shared = cache.k_BJTC.shape[1]
    q = q_BQHC.reshape(rows, queries, shared, heads // shared, channels)
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows, shared, -1, channels)
    scores = jnp.einsum("bjmc,bjtc->bjmt", q, cache.k_BJTC, preferred_element_type=jnp.float32)
    if new_kv:
        own = jnp.einsum("bjmc,btjc->bjmt", q, new_kv[0], preferred_element_type=jnp.float32)
        scores = jnp.concatenate([scores, own], axis=-1)
    scores = scores.reshape(rows, shared, heads // shared, queries, -1)
    probs = masked_softmax(scores * channels**-0.5, mask_BQT[:, None, None])
    probs = probs.reshape(rows, shared, -1, probs.shape[-1]).astype(cache.v_BJTC.dtype)
    slots, float32 = cache.v_BJTC.shape[2], jnp.float32  # of both, so that it rounds once
    old, own = probs[..., :slots], probs[..., slots:]
    out = jnp.einsum("bjmt,bjtc->bjmc", old, cache.v_BJTC, preferred_element_type=float32)
    if new_kv:
        out += jnp.einsum("bjmt,btjc->bjmc", own, new_kv[1], preferred_element_type=float32)
    out = out.astype(cache.v_BJTC.dtype).reshape(rows, shared, heads // shared, queries, channels)
    return out.transpose(0, 3, 1, 2, 4).reshape(q_BQHC.shape)
