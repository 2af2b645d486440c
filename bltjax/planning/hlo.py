"""A parser of a compiled program's text: its computations, and how often each instruction runs.

XLA's own cost analysis counts a loop's body once and trusts a kernel's own estimate. The text holds
everything: a loop's trip count is in it, or follows from its condition, and calls make a tree, so
each instruction has a number of executions. `hlo_cost.py` has their costs, `hlo_collectives.py`
their communication.

    ENTRY main            x 1
      while  (25 trips)
        body              x 25
          fusion -> fused x 25        only the fusion touches memory, not its parts
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "token": 0, "opaque": 0,
}  # fmt: skip
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
NAME = re.compile(r"%([\w.-]+)")
HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
# By kind, the attributes that name the computations which run as a part of an instruction.
CALLS = {
    "while": ("body",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply",),
    "fusion": ("calls",),
}


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result, in XLA's layout: `bf16[8,64]{1,0:T(8,128)S(1)}`."""

    kind: str
    sizes: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        return self.elements * BYTES[self.kind]

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in main memory: a TPU's VMEM and its scalar memories are S(1) and on."""
        return "S(" not in self.layout

    @cached_property
    def padded_bytes(self) -> float:
        """Bytes in memory: the last axes, in the layout's order, fill whole tiles."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not order:
            return self.bytes
        sizes = [self.sizes[int(axis)] for axis in order.split(",")]  # the fastest axis first
        sides = [int(side) for side in reversed(tile[1].split(","))] + [1] * len(sizes)
        filled = (-(-size // side) * side for size, side in zip(sizes, sides, strict=False))
        return math.prod(filled) * BYTES[self.kind]


@dataclass(frozen=True)
class Instruction:
    name: str
    kind: str  # fusion, while, all-gather-start, ...
    shape: str
    operands: tuple[str, ...]
    argument: str  # the text between the parentheses
    rest: str  # attributes, metadata, backend_config
    is_root: bool = False

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        return read_arrays(self.shape)

    def noted(self, pattern: str) -> str:
        """The first group of a pattern that is searched in the attributes; "" without a match."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next comma; "" where there is none."""
        return self.noted(rf"\b{name}=([^\s,{{]+|\{{[^}}]*\}})")

    @cached_property
    def calls(self) -> tuple[str, ...]:
        """Computations that run as a part of this instruction, other than scalar functions."""
        names = ("calls",) if self.kind.endswith("-start") else CALLS.get(self.kind, ())
        return tuple(x for name in names for x in NAME.findall(self.attribute(name)))


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(x for x in self.instructions.values() if x.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (x for x in self.instructions.values() if x.kind == "parameter")
        return {int(x.argument): x for x in found}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The users of each instruction, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclass
class HloProgram:
    """A module: its computations, how often each runs, and the loops of unknown length."""

    computations: dict[str, Computation]
    entry: str
    runs: dict[str, int] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)
    unknown_loops: set[str] = field(default_factory=set)

    def each(self):
        """(computation, instruction, executions), without instructions that never run."""
        for name, runs in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, runs


def read_arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(kind, tuple(int(s.lstrip("<=")) for s in sizes.split(",") if s), layout)
        for kind, sizes, layout in ARRAY.findall(shape)
        if kind in BYTES
    )


def closing(text: str, begin: int) -> int:
    """The index after the parenthesis that closes the one at `begin`."""
    depth = 0
    for at in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError(f"HLO that cannot be read: {text[:80]!r} has an unclosed parenthesis")


def read_instruction(head: re.Match) -> Instruction:
    """The instruction in a line of which INSTRUCTION matched the beginning."""
    text = head.string[head.end() :]
    end = closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    begin = text.index("(")
    end = closing(text, begin)
    argument = text[begin + 1 : end - 1]
    operands = tuple(NAME.findall(argument))
    return Instruction(head[2], text[:begin], shape, operands, argument, text[end:], bool(head[1]))


def read_program(text: str) -> HloProgram:
    """A program from `compiled.as_text()`.

    Raises:
      ValueError: for text that is no HLO module.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    # An attribute may hold line breaks (a kernel's metadata does); instructions are indented.
    for line in re.sub(r"\n(?=[^\s%}]|\}\})(?!ENTRY )", "", text).splitlines():
        header = HEADER.match(line)
        if header:
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (head := INSTRUCTION.match(line)):
            current.instructions[head[2]] = read_instruction(head)
    if not entry:
        raise ValueError(f"no HLO module: it has no ENTRY, and begins {text[:60]!r}")
    program = HloProgram(computations, entry)
    add_runs(program, entry, 1)
    return program


def add_runs(program: HloProgram, name: str, runs: int) -> None:
    program.runs[name] = program.runs.get(name, 0) + runs
    for instruction in program.computations[name].instructions.values():
        trips = 1
        if instruction.kind == "while":
            trips = trip_count(program, program.computations[name], instruction)
        if trips is None:
            trips = 1
            program.unknown_loops.add(instruction.name)
        for called in instruction.calls:
            if instruction.kind == "fusion" or name in program.fused:
                program.fused.add(called)
            add_runs(program, called, runs * trips)


def trip_count(program: HloProgram, caller: Computation, loop: Instruction) -> int | None:
    """Trip count of a loop: as XLA noted, or for (i = a; i < b; i += c), or None."""
    if known := loop.noted(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    condition = program.computations[NAME.findall(loop.attribute("condition"))[0]]
    body = program.computations[NAME.findall(loop.attribute("body"))[0]]
    compared = scalar_operands(program, condition, condition.root, "compare")
    if compared is None or "direction=LT" not in compared[1].rest:
        return None
    counter, limit = compared[0]
    if counter.kind != "get-tuple-element" or limit.kind != "constant":
        return None
    index = int(counter.attribute("index"))
    begin = source(caller, loop.operands[0], index)
    step = scalar_operands(program, body, body.instructions[body.root.operands[index]], "add")
    if begin is None or begin.kind != "constant" or step is None:
        return None
    sizes = [int(x.argument) for x in step[0] if x.kind == "constant"]
    if len(sizes) != 1 or sizes[0] < 1:
        return None
    return max(0, -(-(int(limit.argument) - int(begin.argument)) // sizes[0]))


def source(computation: Computation, name: str, index: int) -> Instruction | None:
    """The instruction behind element `index` of a tuple, through copies."""
    made = computation.instructions[name]
    if made.kind != "tuple":
        return None
    element = computation.instructions[made.operands[index]]
    while element.kind in ("copy", "bitcast"):
        element = computation.instructions[element.operands[0]]
    return element


def scalar_operands(program: HloProgram, outer: Computation, instruction: Instruction, kind: str):
    """Operands of a `compare` or an `add`, by itself or as the whole of a fusion; and the
    instruction."""
    given = [outer.instructions[name] for name in instruction.operands]
    if instruction.kind == kind:
        return given, instruction
    if instruction.kind != "fusion":
        return None
    inner = program.computations[instruction.calls[0]]
    if inner.root.kind != kind:
        return None
    operands = [inner.instructions[name] for name in inner.root.operands]
    return [given[int(x.argument)] if x.kind == "parameter" else x for x in operands], inner.root
