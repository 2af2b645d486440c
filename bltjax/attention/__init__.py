"""Range attention: every query sees one contiguous range of keys. One meaning, several ways.

where                      query           keys     range
local self-attention       byte n          bytes    [max(n - W + 1, document start), n + 1)
encoder cross-attention    slot of patch   bytes    the patch's bytes
latent self-attention      patch p         patches  [document's first patch, p + 1)
decoder cross-attention    byte n          slots    the slots of the patch that n reads
"""

import logging

import jax

from bltjax.attention.dense import dense
from bltjax.attention.pattern import Pattern, Pooling, Reading, Sliding
from bltjax.attention.xla import xla
from bltjax.shapes import check_shapes

__all__ = ["IMPLEMENTATIONS", "Pattern", "Pooling", "Reading", "Sliding", "range_attention"]

IMPLEMENTATIONS = ("dense", "xla")
_said: set[str] = set()


def range_attention(
    q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, *, pattern: Pattern, implementation: str | None = None
) -> jax.Array:
    """softmax(q k / sqrt(C)) v over keys start <= t < end, [B, Q, H, C] in v's dtype.

    Starts and ends never decrease along Q and keep the `pattern`'s promise. An empty range gives
    zeros. Query head h uses key/value head h // (H / J). Scores and softmax are fp32.

    implementation: None picks by platform, and says so once; a name works or raises.

    Raises:
      ValueError: for an unknown implementation, or sizes that differ or don't divide.
    """
    check_shapes(q_BQHC=q_BQHC, k_BTJC=k_BTJC, v_BTJC=v_BTJC, start_BQ=start_BQ, end_BQ=end_BQ)
    heads, shared = q_BQHC.shape[2], k_BTJC.shape[2]
    if heads % shared:
        raise ValueError(f"key/value heads ({shared}) must divide query heads ({heads})")
    if implementation is None:
        implementation = "xla"
        platform = jax.default_backend()
        if platform not in _said:
            _said.add(platform)
            logging.getLogger(__name__).info("attention on %s: %s", platform, implementation)
    if implementation == "dense":
        return dense(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ)
    if implementation == "xla":
        return xla(q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, pattern)
    raise ValueError(
        f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
    )
