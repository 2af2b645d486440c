"""Plans of a decoder without its devices: the programs of `generate`, compiled for a slice.

Memory is the compiler's figure for each program. The traffic of a byte is that of the program for
one byte, and its share of the program for one patch; at a chip's published bandwidth that bounds
bytes per second. It is not a measurement.
"""

import dataclasses
import time
from dataclasses import dataclass

import jax

from bltjax.config.run import MeshConfig, RunConfig
from bltjax.configured import model_config, resolved
from bltjax.distributed.sharding import make_mesh
from bltjax.distributed.topology import Topology
from bltjax.families import family_of
from bltjax.inference.decoding.programs import decoder_programs
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.planning.aot import TooLarge, compile_ahead, described_devices, shard_bytes, used_bytes
from bltjax.planning.hlo import read_program
from bltjax.planning.hlo_collectives import by_kind_and_axis, read_collectives
from bltjax.planning.hlo_cost import read_cost
from bltjax.progress import quantity


@dataclass(frozen=True)
class ProgramCost:
    """Sizes of one program on one chip, in bytes; bytes moved are None where it was too large."""

    total: float
    moved: float | None = None
    collectives: list[dict] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class GenerationPlan:
    topology: Topology
    mesh: dict[str, int]
    rows: int
    prompt_bytes: int
    context: int
    mean_patch: float
    weights: dict[str, float]  # bytes on a chip
    state: float
    programs: dict[str, ProgramCost]
    compile_s: float

    @property
    def total(self) -> float:
        return max(program.total for program in self.programs.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.topology.chip.hbm_bytes

    @property
    def moved(self) -> float | None:
        """Bytes that a chip moves per byte in each of its rows."""
        byte, patch = (self.programs[name].moved for name in ("byte", "patch"))
        return None if byte is None or patch is None else byte + patch / self.mean_patch

    @property
    def bytes_per_second(self) -> float | None:
        """Upper bound, for all rows."""
        return self.moved and self.rows * self.topology.chip.hbm_rate / self.moved

    def summary(self) -> dict:
        """The plan as JSON values, for programs."""
        names = ("mesh", "rows", "prompt_bytes", "context", "mean_patch", "fits")
        memory = {name: getattr(self, name) for name in ("weights", "state", "total")}
        return {
            "topology": self.topology.name,
            **{name: getattr(self, name) for name in names},
            "hbm_bytes": memory | {"capacity": self.topology.chip.hbm_bytes},
            "programs": {name: dataclasses.asdict(x) for name, x in self.programs.items()},
            "moved_bytes": self.moved,
            "bound_bytes_per_second": self.bytes_per_second,
            "compile_s": self.compile_s,
        }


def plan_generate(
    config: RunConfig,
    topology: Topology,
    *,
    groups: int,
    rows: int,
    prompt_bytes: int,
    context: int,
) -> GenerationPlan:
    """Compiles a BLT's decoder, with weights in the config's compute dtype.

    config: its mesh, that of training, is not read. groups: of chips, each with all weights.

    Raises:
      ValueError: for a model without patches, more slices than one, a prompt beyond the context, or
        rows that groups of devices don't divide.
    """
    model = model_config(config)
    family = family_of(model)
    if model.patching is None or family.own_patching:
        raise ValueError(f"--generate plans a BLT's decoder: this config trains a {family.title}")
    if topology.slices > 1:
        raise ValueError(f"--generate plans one slice, not {topology.slices}: a decoder is one job")
    if rows < 1:
        raise ValueError(f"--rows is {rows}, not >= 1")
    if not 0 < prompt_bytes <= context:
        raise ValueError(
            f"--prompt_bytes ({prompt_bytes}) is not between 1 and --context ({context})"
        )
    started_at = time.monotonic()
    mesh = make_mesh(MeshConfig(groups, 1, -1), described_devices(topology))
    model = resolved(model, mesh.devices.flat[0])
    mean_patch = model.max_bytes / model.max_patches
    # The released entropy model; the run's own is not read for a plan.
    byte_lm = ByteLMConfig() if model.by_entropy else None
    made = decoder_programs(
        model,
        byte_lm,
        mesh,
        rows=rows,
        prompt=prompt_bytes,
        patches=round(context / mean_patch),
        dtype=jax.numpy.dtype(model.compute_dtype),
        implementation=model.attention,
    )

    def on_chip(tree) -> float:
        return shard_bytes(tree, jax.tree.map(lambda x: x.sharding, tree))

    programs = {}
    for name, lower in made.lower.items():
        try:
            compiled = compile_ahead(lower())
        except TooLarge as error:
            programs[name] = ProgramCost(max(error.needed, topology.chip.hbm_bytes + 1))
            continue
        program = read_program(compiled.as_text())
        programs[name] = ProgramCost(
            used_bytes(compiled),
            read_cost(program).bytes,
            by_kind_and_axis(read_collectives(program, dict(mesh.shape))),
        )
    return GenerationPlan(
        topology,
        dict(mesh.shape),
        rows,
        prompt_bytes,
        context,
        mean_patch,
        {name: on_chip(tree) for name, tree in made.weights["model"].items()}
        | {"byte_lm": on_chip(made.weights["scorer"])},
        on_chip(made.state),
        programs,
        time.monotonic() - started_at,
    )


def decoder_report(found: GenerationPlan, name: str) -> str:
    """One screen for people."""
    chip, mesh = found.topology.chip, found.mesh
    lines = [
        f"{name} decoded on {found.topology.name}: {mesh['data']} groups of {mesh['tensor']} chips;"
        f" {found.rows} rows, prompts of {found.prompt_bytes:,} bytes, context {found.context:,}",
        "weights      "
        + "  ".join(
            f"{part.replace('_', ' ')} {quantity(size)}B" for part, size in found.weights.items()
        )
        + "  per chip",
        f"memory       {quantity(found.state)}B per chip for the state of texts",
    ]
    for program, each in found.programs.items():
        moved = "too large" if each.moved is None else f"moves {quantity(each.moved)}B"
        lines.append(f"{program:13}{quantity(each.total)}B per chip; {moved}")
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines.append(f"HBM per chip {quantity(found.total)}B of {quantity(chip.hbm_bytes)}B: {verdict}")
    if found.bytes_per_second:
        lines.append(
            f"bound        a byte moves {quantity(found.moved)}B per chip (patches of"
            f" {found.mean_patch:.1f} bytes): at most {quantity(found.bytes_per_second)}B/s of text"
        )
    lines.append(
        f"compiled in {found.compile_s:.0f} s. A bound from published rates, not a measurement:"
        " nothing was run."
    )
    return "\n".join(lines)
