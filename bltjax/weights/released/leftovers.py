"""Redundant tensors of a release, which follow from its config and other tensors.

    module.X, _orig_mod.X        X, as torch's wrappers name it when every tensor has the prefix
    ....rotary_emb.inv_freq      the rotary rates, which follow from the config
    a second copy                of an embedding or a head, equal to the first bit for bit

They are dropped with a note. A tensor with any other contents is refused.
"""

import os
import re
from typing import NamedTuple

import numpy as np

from bltjax.attention.rope import RopeScalingConfig, scaled_rates
from bltjax.model.blt.config import BLTConfig, LatentConfig
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.weights.lazy import DTYPES, Tensor, row_runs
from bltjax.weights.released.mapping import Names

WRAPPERS = r"(module\.|_orig_mod\.)*"  # DistributedDataParallel's, torch.compile's
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")


class Rotary(NamedTuple):
    """The rotary settings of one stack."""

    channels: int
    theta: float
    scaling: RopeScalingConfig | None = None

    @property
    def rates(self) -> np.ndarray:
        """float64 [channels / 2], radians per position."""
        rates = self.theta ** (-np.arange(0, self.channels, 2) / self.channels)
        return rates if self.scaling is None else np.asarray(scaled_rates(rates, self.scaling))


def latent_rotary(config: LatentConfig) -> Rotary:
    return Rotary(config.width // config.heads, config.rope_theta, config.rope_scaling)


def rotary_stacks(names: Names, config: BLTConfig | ByteLMConfig) -> dict[str, Rotary]:
    """The rotary settings of each stack, by the prefix of its tensors."""
    if config.group == ByteLMConfig.group:
        return {names.byte_lm: Rotary(config.width // config.heads, config.rope_theta)}
    local = Rotary(config.local.width // config.local.heads, config.local.rope_theta)
    return {
        names.encoder: local,
        names.decoder: local,
        names.latent: latent_rotary(config.latent),
    }


def without_wrappers(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors without the name prefix of torch's wrappers, if all of them have it."""
    shared = os.path.commonprefix(list(tensors))  # noqa: RUF071  (of names, not of paths)
    removed = re.match(WRAPPERS, shared)[0]
    if removed:
        notes.append(f"all tensors have the prefix {removed} of torch's wrappers, which is dropped")
    return {name.removeprefix(removed): tensor for name, tensor in tensors.items()}


def without_leftovers(
    tensors: dict[str, Tensor], expected: set[str], stacks: dict[str, Rotary], notes: list[str]
) -> dict[str, Tensor]:
    """The tensors without rotary rates and second copies that are not expected.

    expected: the names of the mapping.

    Raises:
      ValueError: for rates that are not those of the config.
    """
    kept, rates = {}, []
    for name, tensor in tensors.items():
        if name not in expected and name.endswith(BUFFERS):
            stack = max((s for s in stacks if name.startswith(s)), key=len, default=None)
            if stack is not None:
                check_rates(name, tensor, stacks[stack])
                rates.append(name)
                continue
        kept[name] = tensor
    if rates:
        notes.append(f"{rates[0]}{and_more(rates)} left out: the rotary rates of the config")
    for name in sorted(kept.keys() - expected):
        # A layer or a table without a place is a config of another size, whatever it holds.
        if any(part.isdigit() for part in name.split(".")):
            continue
        first = next((x for x in sorted(kept.keys() & expected) if equal(kept[x], kept[name])), "")
        if first:
            notes.append(f"{name} left out: it is {first} once more, bit for bit")
            del kept[name]
    return kept


def and_more(names: list[str]) -> str:
    """The number of names after the first, in words; empty if there are none."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def check_rates(name: str, tensor: Tensor, rotary: Rotary) -> None:
    """Raises ValueError unless a buffer equals the rates of its config, up to rounding."""
    if name.endswith(BUFFERS[1]):
        rotary = rotary._replace(scaling=None)
    expected = rotary.rates
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{tensor.where}: {name} has shape {tensor.shape}; its config has"
            f" {len(expected)} rotary rates"
        )
    if tensor.dtype not in DTYPES.values():
        raise ValueError(
            f"{tensor.where}: {name} has dtype {tensor.dtype}, not one of {', '.join(DTYPES)}"
        )
    found = tensor.all().astype(np.float64)
    rounding, least = {
        "float32": (1e-5, 0.0),
        "bfloat16": (2**-8, 0.0),
        "float16": (2**-10, 2**-24),
    }[tensor.dtype.name]
    wrong = np.flatnonzero(~(np.abs(found - expected) <= rounding * expected + least))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{tensor.where}: {name} is {found[at]:.6g} at {at}; by the rotary settings of its"
            f" config (theta {rotary.theta:g}) it is {expected[at]:.6g}"
        )


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits, read a block at a time up to the first difference."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.shape:
        return one.all().tobytes() == other.all().tobytes()
    return all(
        np.array_equal(*(t.read(rows.start, rows.stop).view(np.uint8) for t in (one, other)))
        for rows in row_runs(one.shape[0], one.bytes // max(1, one.shape[0]))
    )
