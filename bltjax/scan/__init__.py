"""The selective scan: a linear recurrence whose rate, input and output every position chooses.

    h[n] = exp(step[n] A) h[n - 1] + step[n] v[n] in[n]     of each channel, U states
    y[n] = sum over states of h[n] out[n]                   A = -exp(log_rates)

At a reset, a document's first position, the state before counts as zero. One definition, several
implementations, each for its platform; with the suffix `_interpreted` a kernel runs anywhere,
slowly, for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bltjax.config.letters import check_shapes
from bltjax.distributed.sharding import LETTER_AXES, dividing, on_devices, set_mesh_or_none
from bltjax.scan.dense import dense
from bltjax.scan.pallas_tpu import pallas_tpu
from bltjax.scan.xla import OUTCOME, xla

__all__ = ["IMPLEMENTATIONS", "OUTCOME", "fastest", "selective_scan"]
IMPLEMENTATIONS = ("dense", "xla", "pallas_tpu")
WAYS = {
    "xla": xla,
    "pallas_tpu": pallas_tpu,
    "pallas_tpu_interpreted": functools.partial(pallas_tpu, interpret=True),
}


def fastest(device) -> str:
    """The fastest implementation on a device, present or only described."""
    return "pallas_tpu" if device.platform == "tpu" else "xla"


def selective_scan(
    v_BNI,
    step_BNI,
    log_rates_IU,
    in_BNU,
    out_BNU,
    resets_BN,
    state_BIU=None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y [B, N, I] and the state [B, I, U] after the last position, both float32.

    step: not negative; a step of 0 keeps the state. resets: where the state before counts as zero.
    state: before the first position; None: zeros.

    implementation: a name works or raises (a kernel compiled for another platform than its own
    raises there). None is the `fastest` of this process' first device; name one when compiling for
    other devices.

    Raises:
      ValueError: for an unknown implementation, or sizes that differ.
    """
    sizes = check_shapes(
        v_BNI=v_BNI, step_BNI=step_BNI, log_rates_IU=log_rates_IU, in_BNU=in_BNU, out_BNU=out_BNU,
        resets_BN=resets_BN,
    )  # fmt: skip
    if state_BIU is None:
        state_BIU = jnp.zeros([sizes[letter] for letter in "BIU"], jnp.float32)
    check_shapes(v_BNI=v_BNI, log_rates_IU=log_rates_IU, state_BIU=state_BIU)
    fp32 = (step_BNI, log_rates_IU, state_BIU)
    step_BNI, log_rates_IU, state_BIU = (x.astype(jnp.float32) for x in fp32)
    arrays = (v_BNI, step_BNI, log_rates_IU, in_BNU, out_BNU, resets_BN, state_BIU)
    if implementation is None:
        implementation = fastest(jax.devices()[0])
    if implementation == "dense":
        return dense(*arrays)
    if implementation in WAYS:
        return by_rows_and_channels(WAYS[implementation], *arrays)
    raise ValueError(
        f"scan implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
    )


def by_rows_and_channels(way, v_BNI, step_BNI, log_rates_IU, in_BNU, out_BNU, resets_BN, state_BIU):
    """`way` of the arrays, on each device's own rows and channels if `jax.set_mesh` set a mesh.

    Neither depends on the others, so the scan itself communicates nothing; gradients that sum over
    channels or rows (of in, out and log_rates) are added over the devices that have some.
    """
    mesh = set_mesh_or_none()
    arrays = (v_BNI, step_BNI, log_rates_IU, in_BNU, out_BNU, resets_BN, state_BIU)
    if mesh is None:
        return way(*arrays)
    rows = dividing(LETTER_AXES["B"], mesh, v_BNI.shape[0])
    channels = dividing(LETTER_AXES["I"], mesh, v_BNI.shape[2])
    spec = PartitionSpec
    wide, narrow, state = spec(rows, None, channels), spec(rows), spec(rows, channels)
    inputs = (wide, wide, spec(channels), narrow, narrow, narrow, state)
    return on_devices(way, mesh, inputs, (wide, state))(*arrays)
