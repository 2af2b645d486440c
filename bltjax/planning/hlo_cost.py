"""The cost of a compiled program on one chip: FLOPs of products and kernels, and bytes moved.

Products are counted by their shapes, 2 for a multiply-add, wherever they stand, as often as they
run. (XLA writes a product on a TPU as a convolution whose window slides over heads; only the
positions that meet something count.) A kernel counts a tile of queries by a tile of keys for each
step of its work list that sees; the steps that a full row leaves idle are kept apart.

Bytes moved are those between main memory and the chip: operands and results of unfused
instructions, with a TPU's padding. Values that are fused, or lie in VMEM, move nothing; of an array
of which only a slice is read or written, the slice counts; a buffer that is only passed on counts
nothing.
"""

import functools
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from bltjax.attention.pattern import Blocks, Pattern, Pooling, Reading, Sliding, Whole
from bltjax.attention.staircase import Tiles, row_steps, visible_tiles
from bltjax.planning.hlo import Array, Computation, HloProgram, Instruction

# Instructions that name, group or describe arrays, and move none.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "partition-id", "replica-id", "async-start",
    "async-update", "add-dependency", "domain",
}  # fmt: skip
PATTERNS = {kind.__name__: kind for kind in (Sliding, Pooling, Reading, Whole, Blocks)}
SLICES = ("dynamic-slice", "slice", "gather")
# Attributes of a convolution's window, `3x1` or `1_1x0_0` by axis, and their defaults.
WINDOW = {"size": 1, "pad": 0, "stride": 1, "lhs_dilate": 1, "rhs_dilate": 1}
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # index of the operand that is written


@dataclass(frozen=True)
class Cost:
    """Cost on one chip, for one run of the program."""

    products: float  # FLOPs outside kernels
    kernels: float  # FLOPs of the tiles visited in full rows of one document
    idle: float  # FLOPs of idle steps in the kernels' grids
    bytes: float  # to and from main memory

    @property
    def flops(self) -> float:
        return self.products + self.kernels


def read_cost(program: HloProgram) -> Cost:
    products = kernels = idle = moved = 0.0
    for computation, instruction, runs in program.each():
        if instruction.kind in ("dot", "convolution"):
            products += runs * product_flops(computation, instruction)
        elif is_kernel(instruction):
            flops, share = kernel_flops(computation, instruction)
            kernels += runs * flops * share
            idle += runs * flops * (1 - share)
        if computation.name not in program.fused:
            moved += runs * moved_bytes(program, computation, instruction)
    return Cost(products, kernels, idle, moved)


def product_flops(computation: Computation, instruction: Instruction) -> int:
    left, right = (computation.instructions[x].arrays[0] for x in instruction.operands[:2])
    if instruction.kind == "dot":
        axes = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))
        return 2 * instruction.arrays[0].elements * math.prod(left.sizes[int(x)] for x in axes)
    return convolution_flops(instruction, left, right)


def convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    """2 for each output and each input that its window meets, padding left out.

    `dim_labels=0bf_0io->0bf` names the axes: b batch, f features, i and o of the kernel, and the
    digits, along which the window slides.
    """
    labels_left, labels_right, labels_out = re.split("_|->", instruction.attribute("dim_labels"))
    out = dict(zip(labels_out, instruction.arrays[0].sizes, strict=True))
    into = dict(zip(labels_left, left.sizes, strict=True))
    kernel = dict(zip(labels_right, right.sizes, strict=True))
    window = dict(re.findall(r"(\w+)=([\w.\-]+)", instruction.attribute("window").strip("{}")))
    met = 1
    for index, axis in enumerate(sorted(label for label in labels_out if label.isdigit())):
        size, low, stride, spread, kernel_spread = (
            int(re.match(r"-?\d+", window[name].split("x")[index])[0])
            if name in window
            else default
            for name, default in WINDOW.items()
        )
        met *= met_positions(out[axis], size, into[axis], low, stride, spread, kernel_spread)
    return 2 * out["b"] * out["f"] * kernel["i"] * met


@functools.cache
def met_positions(out, window, size, low, stride, spread, kernel_spread) -> int:
    """Pairs of an output and a position of its window that lie on an input, along one axis."""
    index = np.arange(out)[:, None] * stride + np.arange(window)[None] * kernel_spread - low
    inside = (index >= 0) & (index < (size - 1) * spread + 1) & (index % spread == 0)
    return int(inside.sum())


def is_kernel(instruction: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.rest


def kernel_flops(computation: Computation, instruction: Instruction) -> tuple[float, float]:
    """A kernel's own estimate, and the share of its steps that see something in a full row."""
    flops = instruction.noted(r'"cost_estimate":\s*\{[^}]*?"flops":\s*"?(\d+)')
    if not flops:
        raise ValueError(f"kernel {instruction.name} has no cost estimate")
    # The pattern and tiles that a range attention kernel recorded when it was compiled.
    text = instruction.noted(r"kernel_metadata=(\{[^}]*\})")
    notes = json.loads(text.replace('\\"', '"')) if len(text) > 2 else {}
    if "pattern" not in notes:
        return float(flops), 1.0
    kind, *size = notes["pattern"].split()
    pattern = PATTERNS[kind](*map(int, size))
    tiles = Tiles(*map(int, notes["tiles"].split("x")))
    q, k = (computation.instructions[x].arrays[0].sizes[-1] for x in instruction.operands[5:7])
    return float(flops), visited_share(pattern, q, k, tiles)


@functools.cache
def visited_share(pattern: Pattern, queries: int, keys: int, tiles: Tiles) -> float:
    """Share of the steps of a work list that see, in a full row that is one document.

    A window's list, and a whole document's, has no others. Between bytes and slots it depends on
    the patches: here their lengths are random, the same every time.
    """
    if isinstance(pattern, Sliding | Whole):
        return 1.0
    if isinstance(pattern, Blocks):
        begin = np.arange(queries) // pattern.size * pattern.size
        end = np.minimum(begin + pattern.size, keys)
        first, last = visible_tiles(begin[None], end[None], tiles)
        return int((last - first).sum()) / row_steps(pattern, queries, keys, tiles)
    slots, pools = pattern.slots, isinstance(pattern, Pooling)
    patches, byte_count = (queries, keys) if pools else (keys, queries)
    patches //= slots
    draw = np.random.default_rng(0)
    cuts = np.sort(draw.choice(np.arange(1, byte_count), patches - 1, replace=False))
    starts = np.concatenate([[0], cuts, [byte_count]])
    if pools:
        begin, end = np.repeat(starts[:-1], slots), np.repeat(starts[1:], slots)
    else:
        before = np.searchsorted(starts, np.arange(1, byte_count + 1), side="right") - 2
        begin, end = np.maximum(before, 0) * slots, (before + 1) * slots
    first, last = visible_tiles(begin[None], end[None], tiles)
    return int((last - first).sum()) / row_steps(pattern, queries, keys, tiles)


def moved_bytes(program: HloProgram, computation: Computation, instruction: Instruction) -> float:
    """Bytes that one run of an instruction reads from main memory and writes to it."""
    kind = instruction.kind
    if kind in FREE or kind.endswith("-done"):
        return 0
    if is_kernel(instruction):
        return float(instruction.noted(r'"bytes_accessed":"(\d+)"') or 0)
    if kind == "copy-start":  # (destination, source, a flag)
        return in_hbm(instruction.arrays[:2])
    if kind == "slice-start":  # (source, its slice, a flag): the rest of the source stays unread
        part = instruction.arrays[1:2]
        return padded(part) + in_hbm(part)
    given = [computation.instructions[x] for x in instruction.operands]
    if kind == "fusion":
        inner = program.computations[instruction.calls[0]]
        inputs = [index for index, x in enumerate(given) if in_hbm(x.arrays)]
        read = sum(read_bytes(program, inner, index) for index in inputs)
        return read + written_bytes(program, inner, instruction.arrays)
    if kind == "custom-call":
        return 0  # buffers that are set aside, and notes to the compiler
    if kind.endswith("-start"):  # of a collective: (operands, results, flags)
        return 2 * sum(in_hbm(x.arrays) for x in given)
    result = in_hbm(instruction.arrays)
    if kind in SLICES:
        return 2 * result
    if kind in UPDATES:
        return 2 * sum(in_hbm(x.arrays) for x in given[1:])
    return result + sum(in_hbm(x.arrays) for x in given)


def padded(arrays: tuple[Array, ...]) -> float:
    return sum(x.padded_bytes for x in arrays)


def in_hbm(arrays: tuple[Array, ...]) -> float:
    return sum(x.padded_bytes for x in arrays if x.in_hbm)


def read_bytes(program: HloProgram, inner: Computation, index: int) -> float:
    """Bytes that a fusion reads of its operand: all of it, or the slices that it takes."""
    operand = inner.parameters[index]
    total, whole = 0.0, padded(operand.arrays)
    seen, left = set(), [operand]
    while left:
        name = left.pop().name
        for user in inner.users[name]:
            if user.name in seen:
                continue
            seen.add(user.name)
            if user.kind == "bitcast":
                left.append(user)
            elif user.kind in SLICES and user.operands[0] == name:
                total += padded(user.arrays)
            elif user.kind in UPDATES and user.operands[0] == name:
                continue  # parts that are not overwritten don't move
            elif user.kind == "tuple" or "chain_id=" in user.rest:
                continue  # passed on; a collective in progress
            elif user.kind == "fusion":
                called = program.computations[user.calls[0]]
                for position, given in enumerate(user.operands):
                    if given == name:
                        total += read_bytes(program, called, position)
            else:
                return whole
    return min(total, whole)


def written_bytes(program: HloProgram, inner: Computation, arrays: tuple[Array, ...]) -> float:
    """Bytes that a fusion writes: its results, or the slices of them that it overwrites."""
    root = inner.root
    if root.kind != "tuple":
        return bytes_written(program, inner, root, arrays)
    return sum(
        bytes_written(program, inner, inner.instructions[name], (array,))
        for name, array in zip(root.operands, arrays, strict=False)
    )


def bytes_written(program: HloProgram, inner: Computation, made: Instruction, arrays) -> float:
    while made.kind == "bitcast":
        made = inner.instructions[made.operands[0]]
    if made.kind == "parameter" or "chain_id=" in made.rest or not in_hbm(arrays):
        return 0
    if made.kind in UPDATES:
        return padded(inner.instructions[made.operands[UPDATES[made.kind]]].arrays)
    if made.kind == "fusion":
        return written_bytes(program, program.computations[made.calls[0]], arrays)
    return in_hbm(arrays)
