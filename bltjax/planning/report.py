"""A plan as text: memory, operations, bounds, suggested changes."""

import dataclasses
from dataclasses import dataclass

from bltjax.config.run import RunConfig
from bltjax.configured import model_config
from bltjax.distributed.topology import Topology
from bltjax.planning.aot import DeviceMemory
from bltjax.planning.hlo_cost import Cost
from bltjax.planning.roofline import Bound
from bltjax.planning.suggest import Suggestion
from bltjax.progress import quantity


@dataclass(frozen=True)
class Flops:
    """FLOPs of one step on all chips; `compiler` is None where compiling didn't finish."""

    paper: float
    exact: float
    rematerialised: float  # recomputed in the backward pass
    entropy_model: float  # the paper's formula for the byte LM that scores as many bytes, once
    compiler: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.compiler and self.compiler / (self.exact + self.rematerialised)


@dataclass(frozen=True)
class Plan:
    """The results of compiling a training step."""

    config: RunConfig
    topology: Topology
    mesh: dict[str, int]
    parameters: dict[str, int]
    memory: DeviceMemory
    flops: Flops
    compile_s: float
    # The fields of `Account`; None and empty where it was too large to compile.
    cost: Cost | None = None
    collectives: list[dict] = dataclasses.field(default_factory=list)
    bound: Bound | None = None
    unknown_loops: int = 0

    def summary(self) -> dict:
        """The plan as JSON values, for programs."""
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
            "rows": self.config.data.batch_size,
            "accumulate": self.config.optimizer.grad_accum_steps,
            "fits": self.memory.fits,
            "parameters": self.parameters,
            "hbm_bytes": memory,
            "flops": flops,
            "kernels": self.cost
            and {"visited": self.cost.kernels, "idle": self.cost.idle},  # of one chip
            "moved_bytes": self.cost and self.cost.bytes,
            "collectives": self.collectives,
            "bound": self.bound and {name: getattr(self.bound, name) for name in names},
            "compile_s": self.compile_s,
        }


def gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def memory_lines(memory: DeviceMemory, width: int = 60) -> list[str]:
    """A bar from zero to a chip's capacity, and its legend."""
    parts = {"p": memory.parameters, "o": memory.optimizer, "a": memory.activations}
    bar, done = "", 0.0
    for letter, size in parts.items():
        done += size
        bar += letter * (round(done / memory.capacity * width) - len(bar))
    bar = bar[:width] + ">" if done > memory.capacity else bar.ljust(width, ".")
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    return [
        f"HBM per chip [{bar}] {gib(memory.total)} of {gib(memory.capacity)}: {verdict}",
        f"             p parameters {gib(memory.parameters)}  o optimizer {gib(memory.optimizer)}"
        f"  a activations, gradients, code {gib(memory.activations)}",
    ]


def flops_lines(found: Plan) -> list[str]:
    flops = found.flops
    line = (
        f"FLOPs/step   paper {quantity(flops.paper)}  exact {quantity(flops.exact)}  with"
        f" recomputation {quantity(flops.exact + flops.rematerialised)}"
    )
    if flops.compiler:
        line += f"  compiled {quantity(flops.compiler)}, {flops.ratio:.3f} times that"
    lines = [line]
    if found.cost and found.cost.kernels:
        chips = found.topology.devices
        lines.append(
            f"             in attention kernels {quantity(found.cost.kernels * chips)}, tiles"
            f" that see something; idle steps have room for {quantity(found.cost.idle * chips)}"
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
    limits, lines = found.bound, [f"moved        {quantity(found.cost.bytes)}B per chip"]
    for index, each in enumerate(found.collectives):
        name = "" if index else "collectives"
        lines.append(
            f"{name:13}{each['kind']} over {each['axis']}: {quantity(each['bytes'])}B per chip"
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
        f" {limits.mfu:.1%} MFU, {quantity(limits.bytes_per_second_per_chip)}B/s per chip",
    ]


def plan_report(found: Plan, name: str) -> str:
    """One screen for people."""
    topology, data = found.topology, found.config.data
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    hosts = -(-topology.chips // topology.chip.host_chips)
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    counts = "  ".join(
        f"{part.replace('_', ' ')} {quantity(count)}" for part, count in found.parameters.items()
    )
    accumulate = found.config.optimizer.grad_accum_steps
    cut = f", in {accumulate} micro-batches" if accumulate > 1 else ""
    patches = f" and {data.max_patches:,} patches" if model_config(found.config).patching else ""
    lines = [
        f"{name} on {slices}{topology.name}: {topology.chips} chips, {hosts} hosts; mesh {mesh}",
        f"a step is {data.batch_size} rows of {data.seq_len:,} bytes{patches}{cut}",
        f"parameters   {counts}",
        *memory_lines(found.memory),
        *flops_lines(found),
        *bound_lines(found),
        f"compiled in {found.compile_s:.0f} s. A bound from published rates, not a measurement:"
        " nothing was run.",
    ]
    return "\n".join(lines)


def suggestion_lines(changes: list[Suggestion], memory: DeviceMemory) -> list[str]:
    lines = ["it would fit with" if changes else "no small change makes it fit: use a larger slice"]
    for change in changes:
        how = "compiled" if change.compiled else "estimated"
        lines.append(f"    {change.options}   {gib(change.total)} of {gib(memory.capacity)}, {how}")
    return lines
