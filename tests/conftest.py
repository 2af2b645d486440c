"""Every test runs with rank promotion forbidden, and with its seed printed when it has one."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
