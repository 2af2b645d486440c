"""The definition of range attention, written for reading: one mask, one softmax, any pattern."""

import jax
import jax.numpy as jnp


def dense(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ):
    """softmax(q k / sqrt(C)) v over keys start <= t < end; zeros where the range is empty."""
    rows, queries, heads, channels = q_BQHC.shape
    key_value_heads = k_BTJC.shape[2]
    q_BQJIC = q_BQHC.reshape(rows, queries, key_value_heads, heads // key_value_heads, channels)
    scores = jnp.einsum("bqjic,btjc->bjiqt", q_BQJIC, k_BTJC, preferred_element_type=jnp.float32)
    key_11T = jnp.arange(k_BTJC.shape[1])[None, None]
    mask_BQT = (start_BQ[:, :, None] <= key_11T) & (key_11T < end_BQ[:, :, None])
    probs = masked_softmax(scores * channels**-0.5, mask_BQT[:, None, None])
    out = jnp.einsum("bjiqt,btjc->bqjic", probs.astype(v_BTJC.dtype), v_BTJC)
    return out.reshape(q_BQHC.shape)


def masked_softmax(scores, mask):
    """Softmax over the last axis where `mask`; zeros, and zero gradients, where the mask is
    empty."""
    top = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-1e30)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - jax.lax.stop_gradient(top), 0.0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
