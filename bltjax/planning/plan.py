"""A pod planned without a pod: the real training step, compiled for a slice that nobody rented.

What comes out is what the compiler says of memory, what the program's text says of operations, of
bytes and of collectives, and the least time that a chip's published rates allow. Nothing is run, so
nothing here is a measurement. The exit status is 1 when the step doesn't fit.
"""

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass

import jax

from bltjax.config.load import load_config
from bltjax.config.run import ByteLMConfig, RunConfig
from bltjax.data.packing import unwritten_rows
from bltjax.distributed.sharding import make_mesh
from bltjax.distributed.topology import Topology, read_topology
from bltjax.inference.decoding.request import CONTEXT
from bltjax.model import parameter_count
from bltjax.model.flops import paper_flops, recomputed_flops, training_flops
from bltjax.planning.aot import (
    Memory,
    TooLarge,
    compile_ahead,
    described_devices,
    shard_bytes,
    used_bytes,
)
from bltjax.planning.hlo_collectives import by_kind_and_axis
from bltjax.planning.hlo_cost import Work
from bltjax.planning.plan_decoder import plan_generate
from bltjax.planning.plan_decoder import text as decoder_text
from bltjax.planning.roofline import Bound, account
from bltjax.planning.suggest import Change, nearest_changes
from bltjax.training.metrics import quantity
from bltjax.training.step import step_parts


@dataclass(frozen=True)
class Flops:
    """Of one step on all chips; `compiler` is None where nothing was compiled to the end."""

    paper: float
    exact: float
    rematerialised: float  # what the backward pass computes anew
    entropy_model: float  # the paper's formula for the byte LM that scores as many bytes, once
    compiler: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.compiler and self.compiler / (self.exact + self.rematerialised)


@dataclass(frozen=True)
class Plan:
    """What one compilation told of a training step."""

    config: RunConfig
    topology: Topology
    mesh: dict[str, int]
    parameters: dict[str, int]
    memory: Memory
    flops: Flops
    compile_s: float
    work: Work | None = None  # this and what follows: None where it was too large to compile
    collectives: list[dict] = dataclasses.field(default_factory=list)
    bound: Bound | None = None
    unknown_loops: int = 0

    def summary(self) -> dict:
        """For programs: names and units as the README lists them."""
        flops = dataclasses.asdict(self.flops) | {"ratio": self.flops.ratio}
        memory = {
            name: int(getattr(self.memory, name))
            for name in ("parameters", "optimizer", "activations", "total", "capacity")
        }
        names = [field.name for field in dataclasses.fields(Bound)]
        names += ["interconnect_s", "step_s", "limit"]
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "mesh": self.mesh,
            "rows": self.config.data.rows,
            "accumulate": self.config.optimizer.accumulate,
            "fits": self.memory.fits,
            "parameters": self.parameters,
            "hbm_bytes": memory,
            "flops": flops,
            "kernels": self.work
            and {"visited": self.work.kernels, "idle": self.work.idle},  # of one chip
            "moved_bytes": self.work and self.work.bytes,
            "collectives": self.collectives,
            "bound": self.bound and {name: getattr(self.bound, name) for name in names},
            "compile_s": self.compile_s,
        }


def batch_shapes(config: RunConfig):
    """The shapes of a batch as the pipeline makes it."""
    row = unwritten_rows(1, config.data.row_bytes)
    rows = config.data.rows
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in row.items()}


def needed_flops(config: RunConfig) -> Flops:
    data = config.data
    sizes = (data.rows, data.row_bytes, data.row_patches)
    scorer = ByteLMConfig()  # the released entropy model; the run's own is not read for a plan
    by_entropy = config.blt is not None and config.patching.mode == "entropy"
    step_bytes = data.rows * data.row_bytes
    return Flops(
        paper=3 * step_bytes * paper_flops(config.model, *sizes[1:]),
        exact=training_flops(config.model, *sizes),
        rematerialised=data.rows * recomputed_flops(config.model, *sizes[1:]),
        entropy_model=step_bytes * paper_flops(scorer, *sizes[1:]) if by_entropy else 0.0,
    )


def check(config: RunConfig, topology: Topology) -> None:
    """Raises ValueError where slices don't divide the mesh, before anything is made."""
    data, slices = config.mesh.data, topology.slices
    if slices > 1 and data % slices:
        raise ValueError(
            f"the number of slices ({slices}) must divide mesh.data ({data}), because slices only"
            f" exchange gradients: --config.mesh.data={slices}"
        )


def plan(config: RunConfig, topology: Topology) -> Plan:
    """Compiles a training step for a topology and reads what came out.

    Raises:
      ValueError: where the mesh, the batch and the topology don't go together, with both numbers.
    """
    check(config, topology)
    devices = described_devices(topology)
    begun = time.monotonic()
    mesh = make_mesh(config.mesh, devices)
    parts = step_parts(config, mesh)
    memory = Memory(
        shard_bytes(parts.shapes.params, parts.shardings.params),
        shard_bytes(parts.shapes.opt, parts.shardings.opt),
        0.0,
        topology.chip.hbm_bytes,
    )
    found = Plan(
        config,
        topology,
        dict(mesh.shape),
        parameter_count(parts.shapes.params, config.model),
        memory,
        needed_flops(config),
        0.0,
    )
    with jax.set_mesh(mesh):
        lowered = parts.step.lower(parts.shapes, batch_shapes(config))
        try:
            compiled = compile_ahead(lowered)
        except TooLarge as error:
            # What the compiler says may be the temporaries alone.
            total = max(error.needed, topology.chip.hbm_bytes) + memory.parameters
            total += memory.optimizer
            return dataclasses.replace(
                found,
                memory=dataclasses.replace(memory, total=total),
                compile_s=time.monotonic() - begun,
            )
    spent = time.monotonic() - begun
    step_bytes = config.data.rows * config.data.row_bytes
    told = account(compiled.as_text(), topology, mesh, found.flops.exact, step_bytes)
    flops = dataclasses.replace(found.flops, compiler=told.work.flops * mesh.size)
    return dataclasses.replace(
        found,
        memory=dataclasses.replace(memory, total=used_bytes(compiled)),
        flops=flops,
        compile_s=spent,
        work=told.work,
        collectives=by_kind_and_axis(told.collectives),
        bound=told.bound,
        unknown_loops=told.unknown_loops,
    )


def gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def memory_lines(memory: Memory, width: int = 60) -> list[str]:
    """A bar from nothing to a chip's capacity, and what its letters are."""
    parts = {"p": memory.parameters, "o": memory.optimizer, "a": memory.activations}
    bar, done = "", 0.0
    for letter, size in parts.items():
        done += size
        bar += letter * (round(done / memory.capacity * width) - len(bar))
    bar = bar[:width] + ">" if done > memory.capacity else bar.ljust(width, ".")
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    return [
        f"HBM a chip   [{bar}] {gib(memory.total)} of {gib(memory.capacity)}: {verdict}",
        f"             p parameters {gib(memory.parameters)}  o optimizer {gib(memory.optimizer)}"
        f"  a activations, gradients, code {gib(memory.activations)}",
    ]


def flops_lines(found: Plan) -> list[str]:
    flops, lines = found.flops, []
    line = (
        f"FLOPs a step paper {quantity(flops.paper)}  exact {quantity(flops.exact)}  with what is"
        f" recomputed {quantity(flops.exact + flops.rematerialised)}"
    )
    if flops.compiler:
        line += f"  compiled {quantity(flops.compiler)}, {flops.ratio:.3f} times that"
    lines.append(line)
    if found.work and found.work.kernels:
        chips = found.topology.devices
        lines.append(
            f"             in attention kernels {quantity(found.work.kernels * chips)}, tiles"
            f" that see something; idle steps have room for {quantity(found.work.idle * chips)}"
        )
    if flops.entropy_model:
        lines.append(
            f"             to score as many bytes with the 100M byte LM (paper):"
            f" {quantity(flops.entropy_model)}, not in this program"
        )
    return lines


def bound_lines(found: Plan) -> list[str]:
    if found.bound is None:
        return ["             too large to be compiled to the end, so there is no bound"]
    limits, lines = found.bound, [f"moved        {quantity(found.work.bytes)}B a chip"]
    for place, each in enumerate(found.collectives):
        name = "" if place else "collectives"
        lines.append(
            f"{name:13}{each['kind']} over {each['axis']}: {quantity(each['bytes'])}B a chip"
        )
    if found.unknown_loops:
        lines.append(
            f"             counted once: {found.unknown_loops} loops, whose rounds depend on data"
            " (look-ups of n-grams: one, unless they are very skewed)"
        )
    network = f"links {seconds(limits.ici_s)}"
    if found.topology.slices > 1:
        network += f"  datacentre network {seconds(limits.dcn_s)}"
    return [
        *lines,
        f"bound        compute {seconds(limits.compute_s)}  HBM {seconds(limits.hbm_s)}  {network}",
        f"             so a step takes {seconds(limits.step_s)} or more ({limits.limit}): at most"
        f" {limits.mfu:.1%} MFU, {quantity(limits.bytes_per_second_per_chip)}B/s a chip",
    ]


def text(found: Plan, name: str) -> str:
    """One screen for people."""
    topology, data = found.topology, found.config.data
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    hosts = -(-topology.chips // topology.chip.host_chips)
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    counts = "  ".join(
        f"{part.replace('_', ' ')} {quantity(count)}" for part, count in found.parameters.items()
    )
    accumulate = found.config.optimizer.accumulate
    cut = f", in {accumulate} micro-batches" if accumulate > 1 else ""
    patches = f" and {data.row_patches:,} patches" if found.config.blt else ""
    lines = [
        f"{name} on {slices}{topology.name}: {topology.chips} chips, {hosts} hosts; mesh {mesh}",
        f"a step is {data.rows} rows of {data.row_bytes:,} bytes{patches}{cut}",
        f"parameters   {counts}",
        *memory_lines(found.memory),
        *flops_lines(found),
        *bound_lines(found),
        f"compiled in {found.compile_s:.0f} s. A bound from published rates, not a measurement:"
        " nothing was run.",
    ]
    return "\n".join(lines)


def change_lines(changes: list[Change], memory: Memory) -> list[str]:
    lines = ["it would fit with" if changes else "nothing near makes it fit: take a larger slice"]
    for change in changes:
        how = "compiled" if change.compiled else "estimated"
        lines.append(f"    {change.options}   {gib(change.total)} of {gib(memory.capacity)}, {how}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, help="configs/FILE.py or configs/FILE.py:ARGUMENT"
    )
    parser.add_argument("--topology", required=True, help="CHIP:SHAPE, such as v5p:4x4x8")
    parser.add_argument("--slices", type=int, default=1, help="how many of them (default: 1)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--generate", action="store_true", help="plan a decoder instead: prefill, byte and patch"
    )
    parser.add_argument(
        "--groups", type=int, default=1, help="of --generate: groups of chips with all weights each"
    )
    parser.add_argument("--rows", type=int, default=1, help="of --generate: texts side by side")
    parser.add_argument("--prompt_bytes", type=int, default=2048, help="of --generate")
    parser.add_argument(
        "--context",
        type=int,
        default=CONTEXT,
        help="of --generate: bytes that caches have room for",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    topology = read_topology(args.topology, args.slices)
    config = load_config(args.config, overrides)
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here may be busy
    if args.generate:
        decoder = plan_generate(
            config,
            topology,
            groups=args.groups,
            rows=args.rows,
            prompt_bytes=args.prompt_bytes,
            context=args.context,
        )
        told = json.dumps(decoder.summary(), indent=2)
        print(told if args.json else decoder_text(decoder, args.config))
        sys.exit(0 if decoder.fits else 1)
    found = plan(config, topology)
    told, lines = found.summary(), [text(found, args.config)]
    if not found.memory.fits:
        changes = nearest_changes(found, plan)
        lines += change_lines(changes, found.memory)
        told["changes"] = [dataclasses.asdict(x) | {"options": x.options} for x in changes]
    print(json.dumps(told, indent=2) if args.json else "\n".join(lines))
    if not found.memory.fits:
        sys.exit(1)
