"""Programs whose operations, bytes and collectives are known by hand, and text that is hard to
parse."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.attention.pattern import Blocks, Pooling, Reading, Sliding, Whole
from bltjax.attention.staircase import Tiles
from bltjax.planning.hlo import Array, read_program
from bltjax.planning.hlo_collectives import read_collectives, read_group
from bltjax.planning.hlo_cost import met_positions, read_cost, visited_share


def compiled_text(function, *shapes) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_loops_multiply():
    def looped(x, w):
        def inner(y, _):
            return jnp.tanh(y @ w), None

        def outer(y, _):
            y, _ = jax.lax.scan(inner, y, None, length=3)
            return y @ w.T, None

        return jax.lax.scan(outer, x, None, length=5)[0]

    program = read_program(compiled_text(looped, (16, 32), (32, 32)))
    assert read_cost(program).products == 2 * 16 * 32 * 32 * 5 * (3 + 1)
    assert not program.unknown_loops


def test_a_loop_without_a_known_count_is_counted_once_and_said():
    def halved(x):
        return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: y @ y, x)

    program = read_program(compiled_text(halved, (8, 8)))
    assert len(program.unknown_loops) == 1
    assert read_cost(program).products == 2 * 8**3


# As a TPU's compiler writes them: the trip count stands in the condition alone, and a kernel's
# metadata holds line breaks.
LOOP = """HloModule jit_step

%fused (p0: bf16[4,8], p1: bf16[8,8]) -> bf16[4,8] {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %product = bf16[4,8]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[4,8], bf16[8,8])) -> (s32[], bf16[4,8], bf16[8,8]) {
  %arg = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[8,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1, frontend_attributes={k={
"pattern":"Sliding 8"
}}, metadata={op_name="a/b"}
  %w = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %y = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused
  ROOT %out = (s32[]{:T(128)}, bf16[4,8]{1,0}, bf16[8,8]{1,0}) tuple(%next, %y, %w)
}

%condition (arg.1: (s32[], bf16[4,8], bf16[8,8])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[8,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)} constant(11)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[4,8], b: bf16[8,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(%zero)
  %init = (s32[]{:T(128)}, bf16[4,8]{1,0}, bf16[8,8]{1,0}) tuple(%copied, %a, %b)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0}, bf16[8,8]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %end = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_trip_counts_from_conditions():
    cost = read_cost(read_program(LOOP))
    assert cost.products == 5 * 2 * 4 * 8 * 8  # 1, 3, 5, 7, 9
    # Tiles of 8 x 128 of two bytes: x, w and y are one each. And scalars: added, copied once.
    assert cost.bytes == 5 * (3 * 8 * 128 * 2 + 3 * 4) + 2 * 4


SLICED = """HloModule sliced

ENTRY %main () -> bf16[16,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = ((bf16[64,128]{1,0:T(8,128)(2,1)}), bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[16:32], [0:128]}
  ROOT %end = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%begun)
}
"""  # noqa: E501


def test_a_slice_reads_no_more_than_itself():
    """Into a chip's small memory, from an array four times as long."""
    assert read_cost(read_program(SLICED)).bytes == 16 * 128 * 2


def test_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        read_program("hello")


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (Array("f32", (2, 3, 5)), 2 * 3 * 5 * 4),
        (Array("bf16", (2, 3, 5), "2,1,0:T(8,128)(2,1)"), 2 * 8 * 128 * 2),
        (Array("bf16", (2, 3, 5), "0,2,1:T(8,128)(2,1)"), 3 * 8 * 128 * 2),
        (Array("f32", (1000,), "0:T(1024)"), 1024 * 4),
    ],
)
def test_memory_of_padded_arrays(array, size):
    assert array.padded_bytes == size


def test_windows_meet_inputs_only():
    # A product over heads: two outputs, a window of two, padding of one on either side.
    assert met_positions(2, 2, 1, 1, 1, 1, 1) == 2
    assert met_positions(5, 3, 5, 1, 1, 1, 1) == 13
    random = np.random.default_rng(seed := np.random.SeedSequence().entropy % 2**32)
    print("seed", seed)
    x, w = random.normal(size=(1, 9, 2)), random.normal(size=(3, 2, 4))
    for stride, spread in ((1, 1), (2, 1), (1, 2)):
        out = jax.lax.conv_general_dilated(
            np.ones_like(x), np.ones_like(w), (stride,), [(2, 1)], (spread,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        met = met_positions(out.shape[1], 3, 9, 2, stride, spread, 1)
        assert met * 2 * 4 == int(out.sum())


def test_visited_tiles():
    tiles = Tiles(256, 256)
    assert visited_share(Sliding(512), 4096, 4096, tiles) == 1
    assert visited_share(Whole(), 4096, 4096, tiles) == 1
    # Of three tiles in a row that a block may reach, the block of 128 lies in one.
    assert visited_share(Blocks(128), 4096, 4096, tiles) == 16 / (3 * 16 - 2)
    for pattern, queries, keys in (
        (Pooling(4), 4096, 4096),
        (Reading(4), 4096, 4096),
        (Reading(2), 16384, 8192),
    ):
        assert 0.9 < visited_share(pattern, queries, keys, tiles) <= 1
    # Patches of one byte each, slots by slots: every edge coincides, so the diagonal is all.
    assert visited_share(Pooling(1), 2048, 2048, tiles) == 8 / 15


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", (0, 1)),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6)),
    ],
)
def test_replica_groups(groups, group):
    text = f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, replica_groups={groups}, to_apply=%a"
    instruction = read_program(
        "ENTRY %main (y: f32[8]) -> f32[8] {\n  %y = f32[8]{0} parameter(0)\n" + text + "\n}"
    ).computations["main"].instructions["x"]  # fmt: skip
    assert read_group(instruction, "all-reduce", {"data": 2, "fsdp": 4}) == group


def test_replica_groups_of_another_kind_are_refused():
    text = "ENTRY %main (y: f32[8]) -> f32[8] {\n  %y = f32[8]{0} parameter(0)\n"
    text += "  ROOT %x = f32[8]{0} all-reduce(%y), replica_groups=somehow, to_apply=%a\n}"
    with pytest.raises(ValueError, match="replica groups that cannot be read: 'somehow"):
        read_collectives(read_program(text), {"data": 8})


COLLECTIVES = """
import functools, json, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from bltjax.planning.hlo import read_program
from bltjax.planning.hlo_collectives import by_kind_and_axis, read_collectives

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (AxisType.Auto,) * 2)
ways = {
    "all-reduce": lambda x: jax.lax.psum(x, "fsdp"),
    "all-reduce data": lambda x: jax.lax.psum(x, "data"),
    "all-reduce both": lambda x: jax.lax.psum(x, ("data", "fsdp")),
    "all-gather": lambda x: jax.lax.all_gather(x, "fsdp"),
    "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
    "looped": lambda x: jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.psum(y, "data") * .5, x),
}
found = {}
for name, way in ways.items():
    spec = PartitionSpec(("data", "fsdp"))
    program = jax.shard_map(way, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(program).lower(jnp.ones((8 * 16, 32))).compile().as_text()
    found[name] = by_kind_and_axis(read_collectives(read_program(text), dict(mesh.shape)))
print(json.dumps(found))
"""


def test_collectives_of_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECTIVES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    size = 16 * 32 * 4  # bytes of one device's part
    expected = {
        "all-reduce": ("all-reduce", "fsdp", 2 * 3 / 4 * size),
        "all-reduce data": ("all-reduce", "data", 2 * 1 / 2 * size),
        "all-reduce both": ("all-reduce", "data,fsdp", 2 * 7 / 8 * size),
        "all-gather": ("all-gather", "fsdp", 3 * size),
        "reduce-scatter": ("reduce-scatter", "fsdp", 3 / 4 * size),
        "all-to-all": ("all-to-all", "fsdp", 3 / 4 * size),
        "collective-permute": ("collective-permute", "data", size),
        "looped": ("all-reduce", "data", 7 * size),
    }
    for name, (kind, axis, sent) in expected.items():
        assert found[name] == [{"kind": kind, "axis": axis, "bytes": sent}], name
