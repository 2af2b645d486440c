"""Layer norm, with or without a bias; the RMS norm is in `model/layers.py`."""

import jax
import jax.numpy as jnp


def layer_norm(x, scale_D, eps: float, bias_D=None):
    """(x - mean) / sqrt(variance + eps) * scale (+ bias) over the last axis.

    The variance is the biased one. Computed in fp32, returned in x's dtype.
    """

    def along(vector_D):
        return jax.lax.broadcast_in_dim(vector_D.astype(jnp.float32), x.shape, (x.ndim - 1,))

    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    normed = centred * inverse * along(scale_D)
    return (normed if bias_D is None else normed + along(bias_D)).astype(x.dtype)
