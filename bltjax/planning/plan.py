"""Plans of a pod without one: the real training step, compiled for a slice that nobody rented.

The output is the compiler's figure for memory, the program text's operations, bytes and
collectives, and the least time at a chip's published rates. Nothing is run, so nothing here is a
measurement. The exit status is 1 when the step doesn't fit.
"""

import argparse
import dataclasses
import json
import sys
import time

import jax

from bltjax.config.run import RunConfig
from bltjax.configured import load_config, model_config, rows_of, training_flops
from bltjax.data.batches import make_batch
from bltjax.distributed.sharding import make_mesh
from bltjax.distributed.topology import Topology, read_topology
from bltjax.families import family_of
from bltjax.inference.decoding.request import CONTEXT
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.model.params import parameter_count
from bltjax.planning.aot import (
    DeviceMemory,
    TooLarge,
    compile_ahead,
    described_devices,
    shard_bytes,
    used_bytes,
)
from bltjax.planning.plan_decoder import decoder_report, plan_generate
from bltjax.planning.report import Flops, Plan, plan_report, suggestion_lines
from bltjax.planning.roofline import account
from bltjax.planning.suggest import nearest_changes
from bltjax.training.step import step_parts


def needed_flops(config: RunConfig) -> Flops:
    data, family, model = config.data, family_of(config), config.model
    N, P = data.seq_len, data.max_patches
    step_bytes = data.batch_size * N
    # The released entropy model; the run's own is not read for a plan.
    scorer, scoring = ByteLMConfig(), 0.0
    if model_config(config).by_entropy:
        scoring = step_bytes * family_of(scorer).paper_flops(scorer, N, P)
    return Flops(
        paper=3 * step_bytes * family.paper_flops(model, N, P),
        exact=training_flops(model, data.batch_size, N, P),
        rematerialised=data.batch_size * family.recomputed_flops(model, N, P),
        entropy_model=scoring,
    )


def check(config: RunConfig, topology: Topology) -> None:
    """Raises ValueError where slices don't divide the mesh, or a row has no size, before anything
    is built."""
    data, slices = config.mesh.data, topology.slices
    if not config.data.max_patches:
        raise ValueError(
            "data.max_patches is 0, to be measured on the text, which a plan doesn't read: give it,"
            " such as --config.data.max_patches=512"
        )
    if slices > 1 and data % slices:
        raise ValueError(
            f"the number of slices ({slices}) must divide mesh.data ({data}), because slices only"
            f" exchange gradients: --config.mesh.data={slices}"
        )


def plan(config: RunConfig, topology: Topology) -> Plan:
    """Compiles a training step for a topology and reads the result.

    Raises:
      ValueError: where the mesh, the batch and the topology don't go together, with both numbers.
    """
    check(config, topology)
    devices = described_devices(topology)
    started_at = time.monotonic()
    mesh = make_mesh(config.mesh, devices)
    parts = step_parts(config, mesh)
    parameters = shard_bytes(parts.shapes.params, parts.shardings.params)
    moments = shard_bytes(parts.shapes.opt, parts.shardings.opt)
    capacity, compiled = topology.chip.hbm_bytes, None
    rows, row_bytes = config.data.batch_size, config.data.seq_len
    described = rows_of(model_config(config))
    sizes = described.sizes(row_bytes, config.data.max_patches)
    batch = make_batch(described.kind, rows, sizes, jax.ShapeDtypeStruct)
    with jax.set_mesh(mesh):
        lowered = parts.step.lower(parts.shapes, batch)
        try:
            compiled = compile_ahead(lowered)
            total = used_bytes(compiled)
        except TooLarge as error:
            # The compiler's figure may cover the temporaries alone.
            total = max(error.needed, capacity) + parameters + moments
    found = Plan(
        config,
        topology,
        dict(mesh.shape),
        parameter_count(parts.shapes.params, config.model),
        DeviceMemory(parameters, moments, total, capacity),
        needed_flops(config),
        time.monotonic() - started_at,
    )
    if compiled is None:
        return found
    costs = account(compiled.as_text(), topology, mesh, found.flops.exact, rows * row_bytes)
    flops = dataclasses.replace(found.flops, compiler=costs.cost.flops * mesh.size)
    return dataclasses.replace(found, flops=flops, **vars(costs))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, help="configs/FILE.py or configs/FILE.py:ARGUMENT"
    )
    parser.add_argument("--topology", required=True, help="CHIP:SHAPE, such as v5p:4x4x8")
    parser.add_argument("--slices", type=int, default=1, help="number of slices (default: 1)")
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
        help="of --generate: capacity of the caches, bytes of text",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    topology = read_topology(args.topology, args.slices)
    config = load_config(args.config, overrides)
    jax.config.update("jax_platforms", "cpu")  # a local TPU may be busy
    if args.generate:
        sizes = {
            name: getattr(args, name) for name in ("groups", "rows", "prompt_bytes", "context")
        }
        found = plan_generate(config, topology, **sizes)
        report, lines, fits = found.summary(), [decoder_report(found, args.config)], found.fits
    else:
        found = plan(config, topology)
        report, lines, fits = found.summary(), [plan_report(found, args.config)], found.memory.fits
        if not fits:
            changes = nearest_changes(found, plan)
            lines += suggestion_lines(changes, found.memory)
            report["changes"] = [dataclasses.asdict(x) | {"options": x.options} for x in changes]
    print(json.dumps(report, indent=2) if args.json else "\n".join(lines))
    if not fits:
        sys.exit(1)
