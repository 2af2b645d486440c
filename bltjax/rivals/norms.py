"""Norms that the rivals have and BLT has not."""

import jax
import jax.numpy as jnp


def layer_norm(x, scale_D, eps: float, bias_D=None):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in fp32, returned in x's
    dtype; the variance is the biased one."""
    wide = x.astype(jnp.float32)
    wide -= jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide *= inverse * jax.lax.broadcast_in_dim(scale_D, x.shape, (x.ndim - 1,))
    if bias_D is not None:
        wide += jax.lax.broadcast_in_dim(bias_D, x.shape, (x.ndim - 1,))
    return wide.astype(x.dtype)
