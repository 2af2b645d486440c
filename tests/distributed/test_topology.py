"""Slices on offer, and those that only libtpu knows."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from bltjax.distributed.topology import CHIPS, chip_of, read_topology


@pytest.mark.parametrize(
    ("name", "chips", "wraps"),
    [
        ("v5e:1x1", 1, (False, False)),
        ("v5e:4x8", 32, (False, False)),
        ("v6e:8x16", 128, (False, True)),
        ("v5e:16x16", 256, (True, True)),
        ("v5p:2x2x1", 4, (False,) * 3),
        ("v5p:2x4x4", 32, (False,) * 3),
        ("v5p:4x4x8", 128, (True,) * 3),
        ("v5p:16x16x24", 6144, (True,) * 3),
        ("v4:16x16x16", 4096, (True,) * 3),
    ],
)
def test_slices_that_are_offered(name, chips, wraps):
    topology = read_topology(name, 2)
    assert topology.chips == 2 * chips and topology.wraps == wraps


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "no chip 'v9'; .* Write CHIP:SHAPE"),
        ("v5p", "v5p comes as 2x2x1"),
        ("v5e:16x32", "v5e comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        # libtpu describes these three without an error.
        ("v5e:32x32", "not offered"),
        ("v5p:4x8x4", r"A <= B <= C, .* Nearest to 128 chips: .*4x4x8 \(128\)"),
        ("v5p:16x16x28", r"at most 6144 chips\. Nearest to 7168 chips: 16x16x24 \(6144\)"),
        ("v5p:0x4x4", "not offered"),
        ("v5p:axbxc", "not offered"),
    ],
)
def test_slices_that_are_not(name, message):
    with pytest.raises(ValueError, match=message):
        read_topology(name)


def test_no_slices_are_refused():
    with pytest.raises(ValueError, match="the number of slices is 0"):
        read_topology("v5e:4x4", 0)


def test_shapes_are_in_order_and_offered_once():
    for kind, chip in CHIPS.items():
        assert len(set(chip.shapes)) == len(chip.shapes)
        counts = [read_topology(f"{kind}:{shape}").chips for shape in chip.shapes]
        assert counts == sorted(counts)


def test_chips_by_the_name_that_jax_has_for_them():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"] and chip_of("cpu") is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("kind", CHIPS)
def test_libtpu_knows_the_chips(kind, monkeypatch):
    from bltjax.planning.aot import described_devices, device_coords

    marks = {"TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"}
    for name in marks:
        monkeypatch.delenv(name, raising=False)
    shape = CHIPS[kind].shapes[2]
    for slices in (1, 2):
        topology = read_topology(f"{kind}:{shape}", slices)
        devices = described_devices(topology)
        assert len(devices) == topology.devices
        assert {device.device_kind for device in devices} == {CHIPS[kind].kind}
        # Later child processes would believe that they run on a TPU.
        assert not marks & os.environ.keys()
        where = device_coords(topology, devices)
        assert len({tuple(place) for place in where.tolist()}) == topology.chips
        assert (where.max(axis=0)[1:] + 1).tolist() == list(topology.sides)


def test_the_readme_of_planning_lists_the_published_rates():
    text = (Path(__file__).parents[2] / "bltjax" / "planning" / "README.md").read_text()
    for kind, chip in CHIPS.items():
        cells = re.search(rf"^\| {kind}\b.*$", text, re.MULTILINE)[0].split("|")
        published = [float(re.match(r"\s*([\d.]+)", cell)[1]) for cell in cells[2:5]]
        assert published == pytest.approx(
            [chip.flops / 1e12, chip.hbm_bytes / 2**30, chip.hbm_rate / 1e9], rel=1e-3
        )
        links, rate = map(float, cells[5].split("x"))
        assert (links, rate) == (chip.links, chip.link_rate / 1e9)
        assert float(cells[6]) == chip.dcn_rate / 1e9
