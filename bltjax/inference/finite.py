"""Numbers that are not finite: refused where they occur, and traced to a parameter.

A NaN hides. An argmax selects it, a threshold treats it as no boundary, and a mean silently passes
it on. So logits, entropies and sums are checked where they come to the host anyway; the parameters,
which are many, are scanned only after something was found.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def counts(params):
    """The number of values that are not finite, for each parameter."""
    return jax.tree.map(lambda x: (~jnp.isfinite(x)).sum(), params)


def not_finite(what: str, models: dict[str, Any]) -> FloatingPointError:
    """The error for `what` is not finite, naming the parameters that are to blame.

    models: parameters by the prefix of their names.
    """
    lines = []
    for prefix, params in models.items():
        for path, count in jax.tree_util.tree_leaves_with_path(jax.device_get(counts(params))):
            if count:
                name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
                values = "1 value that is" if count == 1 else f"{count:,} values that are"
                lines.append(f"parameter {name.rstrip('/')} holds {values} not finite")
    if not lines:
        lines = ["all parameters are finite, so a value computed from them overflows"]
    more = f" ({len(lines) - 1} more parameters do)" if len(lines) > 1 else ""
    return FloatingPointError(f"{what} not finite; {lines[0]}{more}")


def first_not_finite(values: np.ndarray) -> int | None:
    """The first index on the first axis with a value that is not finite; None without one."""
    if np.isfinite(values).all():
        return None
    return int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(axis=1)))
