"""Bounds of small cases that can be worked out by hand."""

import numpy as np
import pytest

from bltjax.distributed.topology import read_topology
from bltjax.planning.hlo_collectives import Collective
from bltjax.planning.hlo_cost import Cost
from bltjax.planning.roofline import bound, collective_seconds


def places_of(name: str, slices: int = 1) -> np.ndarray:
    """Devices in the order of their coordinates, the last side first."""
    sides = read_topology(name).sides
    within = np.stack(np.unravel_index(np.arange(np.prod(sides)), sides), axis=1)
    number = np.repeat(np.arange(slices), len(within))[:, None]
    return np.concatenate([number, np.tile(within, (slices, 1))], axis=1)


V = 6e9


@pytest.mark.parametrize(
    ("kind", "name", "group", "seconds"),
    [
        # 64 chips of a torus have six links of 100 GB/s each.
        ("all-gather", "v5p:4x4x4", range(64), V * 63 / 64 / 600e9),
        ("reduce-scatter", "v5p:4x4x4", range(64), V * 63 / 64 / 600e9),
        ("all-reduce", "v5p:4x4x4", range(64), 2 * V * 63 / 64 / 600e9),
        # A ring along one side of it, two.
        ("all-gather", "v5p:4x4x4", range(4), V * 3 / 4 / 200e9),
        # Half a side has no link from end to end.
        ("all-gather", "v5p:4x4x8", range(4), V * 3 / 4 / 100e9),
        # A flat slice of 4 x 4 is no torus: a corner has two links of 50 GB/s.
        ("all-gather", "v5e:4x4", range(16), V * 15 / 16 / 100e9),
        ("all-gather", "v5e:16x16", range(256), V * 255 / 256 / 200e9),
        # Half of all data crosses the middle of a ring of four, over two links of each chip there.
        ("all-to-all", "v5p:4x4x4", range(64), V * 4 / 8 / 100e9),
        ("all-to-all", "v5e:4x4", range(16), V * 4 / 4 / 50e9),
        ("collective-permute", "v5p:4x4x4", range(2), V / 100e9),
    ],
)
def test_seconds_on_links(kind, name, group, seconds):
    group = tuple(group)
    each = Collective(kind, ("fsdp",), group, 0.0, V, 1, "")
    found = collective_seconds(each, read_topology(name), places_of(name)[list(group)])
    assert found == pytest.approx((seconds, 0.0))


def test_seconds_between_slices():
    topology, where = read_topology("v5e:4x4", 2), places_of("v5e:4x4", 2)
    alone = Collective("all-reduce", ("data",), (0, 16), 0.0, V, 1, "")
    assert collective_seconds(alone, topology, where[[0, 16]]) == (0.0, V / 3.125e9)
    # First within a slice, then a sixteenth across.
    both = Collective("all-reduce", ("data", "fsdp"), tuple(range(32)), 0.0, V, 1, "")
    found = collective_seconds(both, topology, where)
    assert found == pytest.approx((2 * V * 15 / 16 / 100e9, V / 16 / 3.125e9))


def test_the_slowest_is_the_bound():
    topology, where = read_topology("v5p:4x4x4"), places_of("v5p:4x4x4")
    gathers = [Collective("all-gather", ("fsdp",), tuple(range(64)), 0.0, 600e9, 2, "")]
    cost = Cost(products=400e12, kernels=59e12, idle=5e12, bytes=2765e9 / 2)
    found = bound(cost, gathers, topology, where, 64 * 459e12, 6_400)
    assert found.compute_s == 1 and found.hbm_s == 0.5
    assert found.interconnect_s == pytest.approx(2 * 63 / 64) and found.limit == "interconnect"
    assert found.mfu == pytest.approx(64 / 126)
    assert found.bytes_per_second_per_chip == pytest.approx(100 * 64 / 126)
    alone = bound(cost, [], topology, where, 64 * 459e12, 6_400)
    assert alone.limit == "compute" and alone.step_s == 1 and alone.mfu == 1
