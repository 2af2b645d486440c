"""Range attention: every query has one contiguous range of keys. One definition, several
implementations.

where                      query           keys     range
local self-attention       byte n          bytes    [max(n - W + 1, document start), n + 1)
encoder cross-attention    slot of patch   bytes    the patch's bytes
latent self-attention      patch p         patches  [document's first patch, p + 1)
decoder cross-attention    byte n          slots    the slots of the patch that n reads
encoders' self-attention   position n      both     n's document, or n's block in it

Each implementation runs on the platform that it was written for: Pallas kernels for TPU and for
GPU. With the suffix `_interpreted` the kernels run anywhere, slowly, for tests.
"""

import functools
import logging

import jax

from bltjax.attention.dense import dense
from bltjax.attention.pallas.gpu import pallas_gpu
from bltjax.attention.pallas.tpu import pallas_tpu
from bltjax.attention.pattern import Blocks, Pattern, Pooling, Reading, Sliding, Whole
from bltjax.attention.shards import by_rows_and_heads
from bltjax.attention.tiled import OUTCOME
from bltjax.attention.xla import xla
from bltjax.config.letters import check_shapes

__all__ = [
    "IMPLEMENTATIONS",
    "OUTCOME",
    "Blocks",
    "Pattern",
    "Pooling",
    "Reading",
    "Sliding",
    "Whole",
    "fastest",
    "range_attention",
]
IMPLEMENTATIONS = ("dense", "xla", "pallas_tpu", "pallas_gpu")
KERNELS = {
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "pallas_tpu_interpreted": functools.partial(pallas_tpu, interpret=True),
    "pallas_gpu_interpreted": functools.partial(pallas_gpu, interpret=True),
}
_logged: set[str] = set()


def fastest(device) -> str:
    """The fastest implementation on a device, present or only described: its kernels, if they
    compile.

    The choice is logged once per kind of device.
    """
    chosen = "xla"
    if device.platform == "tpu":
        chosen = "pallas_tpu"
    # Triton needs compute capability 8.0, so no T4; AMD's capabilities are names (gfx942).
    capability = getattr(device, "compute_capability", "")
    if device.platform == "gpu" and capability.partition(".")[0].isdecimal():
        chosen = "pallas_gpu" if float(capability) >= 8 else "xla"
    if device.device_kind not in _logged:
        _logged.add(device.device_kind)
        text = "attention on %s: %s"
        logging.getLogger(__name__).info(text, device.device_kind, chosen)
    return chosen


def range_attention(
    q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ, *, pattern: Pattern, implementation: str | None = None
) -> jax.Array:
    """softmax(q k / sqrt(C)) v over keys start <= t < end, [B, Q, H, C] in v's dtype.

    Starts and ends never decrease along Q and satisfy the `pattern`. An empty range gives zeros.
    Query head h uses key/value head h // (H / J). Scores and softmax are fp32.

    implementation: a name works or raises (a kernel compiled for another platform than its own
    raises there). None is the `fastest` of this process' first device; name one when compiling for
    other devices.

    Raises:
      ValueError: for an unknown implementation, or sizes that differ or don't divide.
    """
    check_shapes(q_BQHC=q_BQHC, k_BTJC=k_BTJC, v_BTJC=v_BTJC, start_BQ=start_BQ, end_BQ=end_BQ)
    heads, shared = q_BQHC.shape[2], k_BTJC.shape[2]
    if heads % shared:
        raise ValueError(f"key/value heads ({shared}) must divide query heads ({heads})")
    arrays = (q_BQHC, k_BTJC, v_BTJC, start_BQ, end_BQ)
    if implementation is None:
        implementation = fastest(jax.devices()[0])
    if implementation == "dense":
        return dense(*arrays)
    if implementation == "xla":
        return by_rows_and_heads(functools.partial(xla, pattern=pattern), *arrays)
    if implementation in KERNELS:
        return by_rows_and_heads(
            functools.partial(KERNELS[implementation], pattern=pattern), *arrays
        )
    raise ValueError(
        f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
    )
