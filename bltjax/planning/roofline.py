"""The least time that a compiled program can take on a slice: a bound, not a measurement.

A chip multiplies, reads and writes main memory, and sends over its links; at best all three at
once and at their published rates, so the slowest of them is the bound. On the links

- gathering and reducing V bytes in a group of g chips takes V (g - 1) / g over the links that a
  chip has within the group: one or, where a side's ends are linked, two for each side of the slice
  along which the group lies; an all-reduce sends twice as much;
- in an all-to-all, half of the data crosses the middle of each side;
- a permutation takes one link;
- data for other slices is first reduced within one, and then takes the datacentre network.
"""

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from bltjax.distributed.topology import Topology
from bltjax.planning.aot import device_coords
from bltjax.planning.hlo import read_program
from bltjax.planning.hlo_collectives import Collective, by_kind_and_axis, read_collectives
from bltjax.planning.hlo_cost import Cost, read_cost


@dataclass(frozen=True)
class Bound:
    """Seconds of one step, by resource."""

    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    mfu: float
    bytes_per_second_per_chip: float

    @property
    def interconnect_s(self) -> float:
        return max(self.ici_s, self.dcn_s)

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.hbm_s, self.interconnect_s)

    @property
    def limit(self) -> str:
        """The slowest of the three, in a word or two."""
        network = "datacentre network" if self.dcn_s > self.ici_s else "interconnect"
        times = {"compute": self.compute_s, "HBM": self.hbm_s, network: self.interconnect_s}
        return max(times, key=times.get)


@dataclass(frozen=True)
class Account:
    """The cost of a compiled program on each chip, and its bound."""

    cost: Cost
    collectives: list[dict]  # bytes sent, by kind and axis
    bound: Bound
    unknown_loops: int


def account(text: str, topology: Topology, mesh: Mesh, flops: float, step_bytes: int) -> Account:
    """The account of a compiled program's text; arguments as of `bound`."""
    program = read_program(text)
    cost, collectives = read_cost(program), read_collectives(program, dict(mesh.shape))
    where = device_coords(topology, mesh.devices.flat)
    limits = bound(cost, collectives, topology, where, flops, step_bytes)
    return Account(cost, by_kind_and_axis(collectives), limits, len(program.unknown_loops))


def bound(
    cost: Cost,
    collectives: list[Collective],
    topology: Topology,
    coords: np.ndarray,
    flops: float,
    step_bytes: int,
) -> Bound:
    """The bound of a program.

    coords: int [devices, 4], each device's slice and its coordinates there, in the mesh's order.
    flops: of a step on all chips by the exact formula; step_bytes: text per step.
    """
    chip, devices = topology.chip, len(coords)
    ici = dcn = 0.0
    for each in collectives:
        within, across = collective_seconds(each, topology, coords[list(each.group)])
        ici += each.runs * within
        dcn += each.runs * across
    compute, hbm = cost.flops / chip.flops, cost.bytes / chip.hbm_rate
    step = max(compute, hbm, ici, dcn)
    mfu = flops / (step * devices * chip.flops)
    return Bound(compute, hbm, ici, dcn, mfu, step_bytes / (step * devices))


def collective_seconds(
    each: Collective, topology: Topology, coords: np.ndarray
) -> tuple[float, float]:
    """Seconds on the links of a slice, and on the network between slices."""
    chip = topology.chip
    slices = len(set(coords[:, 0].tolist()))
    inner = coords[coords[:, 0] == coords[0, 0]][:, 1:]
    # Along each side: the group's number of chips, and the links by which a chip reaches them.
    sides = [len(set(inner[:, axis].tolist())) for axis in range(len(topology.sides))]
    links = [
        0 if side == 1 else 2 if wraps and side == whole else 1
        for side, whole, wraps in zip(sides, topology.sides, topology.wraps, strict=True)
    ]
    size = len(inner)
    if each.kind == "collective-permute":
        if slices > 1:
            return 0.0, each.whole / chip.dcn_rate
        return each.whole / chip.link_rate, 0.0
    factor = 2 if each.kind == "all-reduce" else 1
    across = 0.0
    if slices > 1:
        shard = each.whole / size if each.kind != "all-to-all" else each.whole
        across = factor * shard * (slices - 1) / slices / chip.dcn_rate
    if size == 1 or not any(links):  # two devices of one chip
        return 0.0, across
    if each.kind == "all-to-all":
        halves = [side / (4 * count) for side, count in zip(sides, links, strict=True) if count]
        return each.whole * max(halves) / chip.link_rate, across
    return factor * each.whole * (size - 1) / size / (sum(links) * chip.link_rate), across
