"""Parameters that several tests share."""

import functools

import jax


def made_once(make):
    """As `functools.cache`, for arrays: they are no tracers, though the first caller be traced."""

    @functools.cache
    @functools.wraps(make)
    def made(*args, **settings):
        with jax.ensure_compile_time_eval():
            return make(*args, **settings)

    return made
