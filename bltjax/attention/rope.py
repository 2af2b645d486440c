"""Rotary positions on interleaved channel pairs (2i, 2i + 1), angles and rotation in fp32."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from bltjax.config.fields import positive


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Llama 3.1's scaling of rotary rates, for contexts longer than in pretraining.

    Channels that turn fewer than `low_turns` times within `positions` turn `factor` times slower;
    those that turn more than `high_turns` times are unchanged; those between are interpolated.
    """

    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    positions: int = 8192

    def __post_init__(self):
        positive(self, "factor", "low_turns", "high_turns", "positions")
        if self.high_turns <= self.low_turns:
            raise ValueError(
                f"rope_scaling.high_turns ({self.high_turns}) must exceed low_turns"
                f" ({self.low_turns})"
            )


def scaled_rates(rate_C, scaling: RopeScalingConfig):
    """Llama 3.1's rates: slow channels divided by `factor`, fast ones unchanged, a ramp between."""
    turns_C = rate_C * (scaling.positions / (2 * math.pi))
    kept_C = (turns_C - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    kept_C = jnp.clip(kept_C, 0.0, 1.0)
    return rate_C * (kept_C + (1 - kept_C) / scaling.factor)


def rotary_angles(
    position_BT, channels: int, theta: float, scaling: RopeScalingConfig | None = None
):
    """cos and sin, each float32 [B, T, C / 2], of position * theta^(-2i / C)."""
    rate_C = theta ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    if scaling is not None:
        rate_C = scaled_rates(rate_C, scaling)
    angle_BTC = position_BT[..., None].astype(jnp.float32) * rate_C[None, None]
    return jnp.cos(angle_BTC), jnp.sin(angle_BTC)


def endless_angles(position_BT, channels: int, theta: float):
    """As `rotary_angles`, for attention that depends only on differences of positions, of any size.

    Angles are counted in 2^-32 turns by integers that wrap. So two positions 512 apart differ by
    the same angle, to 1e-6, at the start of a text and after gigabytes of it; fp32 products are off
    by 7e-2 at position 5 million.
    """
    rate_C = theta ** (-np.arange(0, channels, 2) / channels)
    units_C = jnp.asarray(np.round(rate_C * 2**31 / np.pi).astype(np.uint32))
    units_BTC = position_BT[..., None].astype(jnp.uint32) * units_C[None, None]
    angle_BTC = units_BTC.astype(jnp.int32).astype(jnp.float32) * (np.pi / 2**31)
    return jnp.cos(angle_BTC), jnp.sin(angle_BTC)


def rotate(x_BTHC, angles):
    """x with each channel pair rotated by its position's angle; computed in fp32, dtype kept."""
    cos, sin = (a[:, :, None, :] for a in angles)
    pairs = x_BTHC.astype(jnp.float32).reshape(*x_BTHC.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BTHC.shape).astype(x_BTHC.dtype)
