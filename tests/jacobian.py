"""Jacobians for tests of leaks, one backward pass after another."""

import jax
import jax.numpy as jnp


def jacobian(function, x):
    """The gradient of each number in function(x), a vector: leaves [numbers, ...].

    As `jax.jacrev`, but without its vmap, whose backward pass of gathers inside a scan is wrong in
    jax 0.10 (it mixes rows that the plain one keeps apart).
    """
    out, pull = jax.vjp(function, x)
    return jax.lax.map(lambda row: pull(row)[0], jnp.eye(len(out), dtype=out.dtype))
