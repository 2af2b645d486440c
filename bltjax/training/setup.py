"""The parts of a run, built once above its loop: mesh, programs, data, and the first state."""

from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from bltjax.config.fields import divides
from bltjax.config.rows import Rows
from bltjax.config.run import RunConfig
from bltjax.configured import check_predicts, tokenizer_of, training_flops
from bltjax.data.batches import Batch
from bltjax.data.pipeline import held_out_batches, training_batches, training_sources
from bltjax.distributed.coordinator import process_count
from bltjax.distributed.processes import (
    barrier,
    broadcast_from_primary,
    compile_in_lockstep,
    is_primary,
)
from bltjax.distributed.rows import local_rows
from bltjax.distributed.sharding import row_sharding
from bltjax.families import family_of
from bltjax.inference.entropy import EntropyModel, scored_source
from bltjax.model.params import parameter_count
from bltjax.progress import quantity
from bltjax.system.environment import random_key
from bltjax.training.init import (
    check_copies,
    check_start,
    entropy_model,
    mesh_and_parts,
    rows_of_run,
    started,
    with_measured_row,
)
from bltjax.training.restore import restore_newest
from bltjax.training.resume import check_sources, check_workdir, setting_changes
from bltjax.training.step import StepParts, TrainState
from bltjax.weights import workdir as ckpt
from bltjax.weights.workdir import TOKENIZER


class Setup(NamedTuple):
    """The parts of a run's loop, without the state."""

    config: RunConfig
    workdir: epath.Path
    resumed: RunConfig | None  # the settings of the run that is resumed
    mesh: Mesh
    parts: StepParts
    sharding: NamedSharding  # of a batch
    rows: Rows
    byte_lm: EntropyModel | None
    streams: list[int]  # of this process
    batches: Any  # grain's iterator
    held_out: list[Batch]
    fingerprints: dict[str, str]  # of the training sources
    flops: int  # of a step
    notes: list[str]  # about paths that changed on resume


def set_up(config: RunConfig, workdir: epath.Path) -> Setup:
    """Builds a run's parts; writes nothing, but checks that the directory is writable.

    Raises:
      ValueError: for a work directory of another run, a mesh that doesn't fit, or data that the
        config cannot use.
    """
    check_predicts(config)
    config = with_measured_row(config, workdir)
    resumed = check_workdir(workdir, config)
    check_start(config, workdir, resumed is not None)
    byte_lm = entropy_model(config, workdir)
    data, notes = config.data, []
    if resumed is not None:
        notes += broadcast_from_primary(
            "comparing copies", lambda: check_copies(resumed, config, workdir, byte_lm)
        )
    mesh, parts = mesh_and_parts(config)
    if config.mesh.tensor == 1:
        divides("the number of processes", process_count(), "data.batch_size", data.batch_size)
    sharding, rows = row_sharding(mesh), rows_of_run(config, workdir)
    streams = local_rows(sharding, data.batch_size)
    sources = training_sources(data, byte_lm.identity if byte_lm else None)
    dataset = training_batches(data, rows, seed=config.seed, streams=streams, sources=sources)
    fingerprints = broadcast_from_primary(
        "comparing sources", lambda: {name: found.fingerprint for name, found in sources.items()}
    )
    if resumed is not None:
        saved = broadcast_from_primary(
            "comparing sources", lambda: ckpt.newest_progress(workdir).get("sources", {})
        )
        notes += check_sources(resumed, config, workdir, saved, fingerprints)
    held_out = []
    for name, source in data.eval.items():
        documents = scored_source(source, rows.patching, byte_lm, skip_bad=data.skip_bad)
        found, cuts = held_out_batches(documents, data, rows)
        held_out += found
        if cuts:
            print(f"held-out {name}: {cuts} cuts in documents longer than a row")
    flops = training_flops(config.model, data.batch_size, data.seq_len, data.max_patches)
    return Setup(
        config, workdir, resumed, mesh, parts, sharding, rows, byte_lm, streams, iter(dataset),
        held_out, fingerprints, flops, notes,
    )  # fmt: skip


def run_summary(setup: Setup) -> str:
    """The run, in one line."""
    config, parts = setup.config, setup.parts
    counts = parameter_count(parts.shapes.params, config.model)
    return (
        f"{family_of(config).title}: {quantity(counts['total'])} parameters ("
        + ", ".join(f"{part} {quantity(n)}" for part, n in counts.items() if part != "total")
        + f"); {quantity(setup.flops)}FLOP per step; mesh {dict(setup.mesh.shape)};"
        + f" {parts.config.compute_dtype}"
        + (f"; {process_count()} processes" if process_count() > 1 else "")
    )


def claim(setup: Setup) -> None:
    """Writes the run's config, byte LM and tokenizer to its work directory."""
    config, workdir = setup.config, setup.workdir
    if is_primary():
        ckpt.write_config(workdir, config)
    if is_primary() and setup.resumed is None:
        if setup.byte_lm:
            ckpt.save_params(workdir / "byte_lm", setup.byte_lm.model, 0)
        if tokenizer := tokenizer_of(config):
            epath.Path(tokenizer).copy(workdir / TOKENIZER, overwrite=True)
    barrier("creating the work directory")


def first_state(setup: Setup) -> tuple[TrainState, int]:
    """The first state of the loop and its step: fresh, or from the newest checkpoint."""
    config, parts = setup.config, setup.parts
    if setup.resumed is None:
        initial_state = jax.jit(parts.initial_state, out_shardings=parts.shardings)
        state = compile_in_lockstep(initial_state)(random_key(config.seed))
        params = started(config, state.params, parts.shardings.params)
        return state._replace(params=params), 0
    target = jax.tree.map(lambda x, of: x.update(sharding=of), parts.shapes, parts.shardings)
    state, streams, progress = restore_newest(setup.workdir, target, setup.streams)
    step = progress["step"]
    setup.batches.set_state(streams)
    print(f"resumed {setup.workdir} after step {step}")
    for line in setting_changes(setup.resumed, config, step):
        print(f"  changed: {line}")
    for line in setup.notes:
        print(f"  {line}")
    return state, step
