"""TPU chips and slices: the figures of a chip, and the slices of a pod that can be rented.

Figures are per chip, from the pages v4, v5e, v5p, v6e and tpu7x under cloud.google.com/tpu/docs,
except where a comment says otherwise. Those pages give the interconnect as the sum over a chip's
links, both ways; here it is one link, one way. libtpu compiles for shapes that nobody rents out, so
the shapes are checked here.
"""

import math
from dataclasses import dataclass

from bltjax.config.fields import nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU as jax counts devices, and its slices."""

    kind: str  # jax's name: `device.device_kind`
    flops: float  # bf16, per second
    hbm_bytes: int  # usable by a program: from libtpu 0.0.42's message when one does not fit
    hbm_rate: float  # bytes per second
    links: int  # to neighbouring chips
    link_rate: float  # bytes per second over one link, one way
    dcn_rate: float  # bytes per second to other slices, one way
    host_chips: int = 4  # of a virtual machine in a slice of several
    devices: int = 1  # per chip, as jax counts them; the figures are per device
    flat: tuple[str, ...] = ()  # slices of a two-dimensional torus
    cubes: int = 0  # of 4 x 4 x 4 chips, in the largest slice of a three-dimensional torus
    options: tuple[tuple[str, str], ...] = ()  # of `get_topology_desc`

    @property
    def shapes(self) -> tuple[str, ...]:
        """Every slice on offer, the smallest first."""
        if self.flat:
            return self.flat
        # The v5p page: A <= B <= C, multiples of 4, and four smaller ones.
        found = []
        for a in range(1, self.cubes + 1):
            for b in range(a, self.cubes // a + 1):
                found += [(a, b, c) for c in range(b, self.cubes // (a * b) + 1)]
        found = [tuple(4 * x for x in sides) for sides in found]
        found.sort(key=lambda sides: (math.prod(sides), sides[::-1]))
        return ("2x2x1", "2x2x2", "2x2x4", "2x4x4", *("x".join(map(str, x)) for x in found))


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v4": Chip(
        kind="TPU v4",
        flops=275e12,
        hbm_bytes=int(30.75 * GIB),  # of 32 GiB
        hbm_rate=1200e9,
        links=6,
        link_rate=50e9,  # 2400 Gbit/s over six
        dcn_rate=6.25e9,  # not on the page; as v5p
        cubes=64,
        options=(("chip_config_name", "megacore"),),  # two cores as one device, as jax runs them
    ),
    "v5e": Chip(
        kind="TPU v5 lite",
        flops=197e12,
        hbm_bytes=int(15.75 * GIB),  # of 16
        hbm_rate=819e9,
        links=4,
        link_rate=50e9,  # 400 GB/s both ways over four
        dcn_rate=3.125e9,  # 6.4 Tbit/s for a pod of 256
        flat=FLAT,
    ),
    "v5p": Chip(
        kind="TPU v5",
        flops=459e12,
        hbm_bytes=int(95.74 * GIB),  # of 95 by the page
        hbm_rate=2765e9,
        links=6,
        link_rate=100e9,  # 1200 GB/s both ways over six
        dcn_rate=6.25e9,  # 50 Gbit/s
        cubes=96,
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        flops=918e12,
        hbm_bytes=int(31.25 * GIB),  # of 32
        hbm_rate=1638e9,
        links=4,
        link_rate=100e9,  # 800 GB/s both ways over four
        dcn_rate=12.5e9,  # 100 Gbit/s
        flat=FLAT,
    ),
    # A chip is two devices to jax, each with half of its memory, rates and links.
    "tpu7x": Chip(
        kind="TPU7x",
        flops=2307e12 / 2,
        hbm_bytes=int(94.75 * GIB),  # of 96
        hbm_rate=7380e9 / 2,
        links=6,
        link_rate=50e9,  # 1200 GB/s both ways over six, for both devices
        dcn_rate=6.25e9,  # 100 Gbit/s for both
        devices=2,
        cubes=144,
    ),
}


@dataclass(frozen=True)
class Topology:
    """Slices of one chip, named as in `v5p:4x4x8`."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.sides) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each side, whether its ends are linked: in cubes, and in a whole flat pod."""
        if self.chip.flat:
            return tuple(side == 16 for side in self.sides)
        return (all(side % 4 == 0 for side in self.sides),) * 3


def read_topology(name: str, slices: int = 1) -> Topology:
    """The topology that `v5p:4x4x8` names.

    Raises:
      ValueError: for an unknown chip or shape, with the known ones.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(
            f"topology {name!r}: no chip {kind!r}{nearest(kind, CHIPS)} Write CHIP:SHAPE, such as"
            " v5e:4x4 or v5p:4x4x8"
        )
    chip = CHIPS[kind]
    if shape not in chip.shapes:
        raise ValueError(f"topology {name!r} is not offered: {offered(kind, shape)}")
    if slices < 1:
        raise ValueError(f"the number of slices is {slices}, not >= 1")
    return Topology(name, chip, tuple(map(int, shape.split("x"))), slices)


def offered(kind: str, shape: str) -> str:
    """The slices of a chip, and the nearest ones to a shape that doesn't exist."""
    chip = CHIPS[kind]
    if chip.flat:
        return f"{kind} comes as {', '.join(chip.flat)}"
    text = (
        f"{kind} comes as 2x2x1, 2x2x2, 2x2x4, 2x4x4, and as AxBxC with A <= B <= C, multiples of"
        f" 4, of at most {64 * chip.cubes} chips"
    )
    sides = [int(side) for side in shape.split("x") if side.isdecimal()]
    if len(sides) != 3 or not all(sides):
        return text
    apart = {x: abs(math.log(chips_of(x) / math.prod(sides))) for x in chip.shapes}
    best = sorted(chip.shapes, key=apart.get)[:4]
    choices = ", ".join(f"{x} ({chips_of(x)})" for x in sorted(best, key=chips_of))
    return f"{text}. Nearest to {math.prod(sides)} chips: {choices}"


def chips_of(shape: str) -> int:
    return math.prod(int(side) for side in shape.split("x"))


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this jax device kind; None if it isn't known here."""
    return next((chip for chip in CHIPS.values() if chip.kind == device_kind), None)
