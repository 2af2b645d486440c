"""Communication of a compiled program between chips: kinds, bytes per chip, mesh axes.

Bytes are those that one chip must send: of an all-gather's result, or a reduce-scatter's operand,
(g - 1) / g in a group of g; twice that of an all-reduce; of an all-to-all (g - 1) / g; of a
permutation all. They depend on shapes alone, not on the compiler's implementation. A TPU's compiler
spreads an all-gather over the fusions that it runs beside; such a chain is one collective. A
reduce-scatter is written as an all-reduce of which each chip keeps a slice, in one fusion.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from bltjax.planning.hlo import Computation, HloProgram, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective of the program, with its number of executions."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which its groups lie
    group: tuple[int, ...]  # indices in the mesh of one group
    bytes: float  # sent per chip in one run
    whole: float  # bytes gathered, reduced or exchanged, per chip of a group
    runs: int
    source: str  # the operation of the model that it comes from


def read_collectives(program: HloProgram, mesh_shape: dict[str, int]) -> list[Collective]:
    """Every collective with more than one chip in a group.

    mesh_shape: from axis to size, in the mesh's order.

    Raises:
      ValueError: for groups in an unknown notation.
    """
    found = []
    for computation, instruction, runs in program.each():
        kind = collective_kind(program, computation, instruction)
        if kind is None:
            continue
        group = read_group(instruction, kind, mesh_shape)
        if len(group) < 2:
            continue
        sent, whole = sizes(computation, instruction, kind, len(group))
        axes = varying_axes(group, mesh_shape)
        source = instruction.noted(r'op_name="([^"]*)"')
        found.append(Collective(kind, axes, group, sent, whole, runs, source))
    return found


def collective_kind(program: HloProgram, computation: Computation, instruction: Instruction):
    """One of KINDS; None for another instruction, or one that continues a collective."""
    kind = instruction.kind.removesuffix("-start")
    users = computation.users[instruction.name]
    if kind == "send":
        return between_slices(instruction) or None
    if kind not in KINDS:
        return None
    if "chain_id=" in instruction.rest and not any("AsyncCollectiveStart" in x.rest for x in users):
        return None
    if kind == "all-reduce" and computation.name in program.fused and scatters(computation, users):
        return "reduce-scatter"
    return kind


def between_slices(instruction: Instruction) -> str:
    """The kind of a collective between slices, which a TPU's program leaves to its host; or ""."""
    kind = instruction.noted(r'_xla_megascale_transfer_type="(\w+)"')
    return kind.lower().replace("_", "-")


def scatters(computation: Computation, users: list[Instruction]) -> bool:
    """Whether only slices of an all-reduce's results are kept, in a fusion."""
    kinds = set()
    for user in users:
        while user.kind in ("get-tuple-element", "bitcast"):
            following = computation.users[user.name]
            if len(following) != 1:
                return False
            user = following[0]
        kinds.add(user.kind)
    return kinds <= {"dynamic-slice", "tuple"} and "dynamic-slice" in kinds


def sizes(computation: Computation, instruction: Instruction, kind: str, group: int):
    """Bytes that a chip sends, and bytes of the whole group's array."""
    operands = instruction.operands[:1] if instruction.kind == "send" else instruction.operands
    given = sum(array.bytes for name in operands for array in computation.instructions[name].arrays)
    if kind == "all-gather":
        given *= group
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)
    return factor * given, given


def read_group(instruction: Instruction, kind: str, mesh_shape: dict[str, int]) -> tuple[int, ...]:
    """Indices in the mesh, counted along its last axis first, of the largest group; for a
    permutation, its first pair that moves anything."""
    count = math.prod(mesh_shape.values())
    if between_slices(instruction):
        target = instruction.noted(r'_xla_megascale_target="\{([\d,:]+)\}')
        return tuple(range(0, count, count // len(listed(target))))
    if kind == "collective-permute":
        text = instruction.noted(r"source_target_pairs=\{(.*?)\}\}")
        pairs = re.findall(r"\{(\d+),(\d+)", text)
        return next((tuple(map(int, pair)) for pair in pairs if pair[0] != pair[1]), ())
    text = instruction.noted(r"replica_groups=(.*)")
    if text.startswith("{{"):
        groups = re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 2])
        return max((tuple(map(int, group.split(","))) for group in groups), key=len)
    if text.startswith("{}"):
        return tuple(range(count))
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        groups, dims, order = (
            [int(x) for x in (part or "").split(",") if x] for part in iota.groups()
        )
        ids = np.arange(np.prod(dims)).reshape(dims)
        return tuple(ids.transpose(order or range(len(dims))).reshape(groups)[0].tolist())
    named = re.match(r"mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
    if named and not named[2].strip():
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return named_group(sizes, named[3])
    raise ValueError(f"replica groups that cannot be read: {text[:90]!r}")


def listed(text: str) -> list[int]:
    """`1,3:5` -> [1, 3, 4, 5]."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        found += range(int(first), int(last or first) + 1)
    return found


def named_group(sizes: dict[str, int], chosen: str) -> tuple[int, ...]:
    """The group of index 0 along axes of a mesh, or along parts of them: `'axis_0':(2)4` is those 4
    indices of an axis that step over everything after the first 2 x 4."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    index = {name: np.zeros(1, int) for name in sizes}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen):
        count = int(size or sizes[name])
        steps = np.arange(count) * (sizes[name] // (int(before or 1) * count))
        index[name] = (index[name][:, None] + steps).reshape(-1)
    return tuple(ids[np.ix_(*index.values())].reshape(-1).tolist())


def varying_axes(group: tuple[int, ...], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group's members differ."""
    where = np.unravel_index(np.array(group), tuple(mesh_shape.values()))
    return tuple(
        axis
        for axis, coords in zip(mesh_shape, where, strict=True)
        if len(set(coords.tolist())) > 1
    )


def by_kind_and_axis(collectives: list[Collective]) -> list[dict]:
    """Bytes that a chip sends in one run of the program, by kind and axes, the most first."""
    total: Counter[tuple[str, str]] = Counter()
    for each in collectives:
        total[each.kind, ",".join(each.axes)] += each.runs * each.bytes
    return [
        {"kind": kind, "axis": axis, "bytes": sent} for (kind, axis), sent in total.most_common()
    ]
