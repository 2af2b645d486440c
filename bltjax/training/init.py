"""Initialisation of a run: its byte LM, its tokenizer, its first parameters."""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bltjax.config.fields import MAY_CHANGE, SAME_CONTENT, changes
from bltjax.config.rows import Rows
from bltjax.config.run import RunConfig
from bltjax.configured import (
    check_mesh,
    model_config,
    model_shapes,
    rows_of,
    tokenizer_of,
    with_tokenizer,
)
from bltjax.data.tokenizer import with_positions
from bltjax.distributed.sharding import fitting_meshes, make_mesh, tree_shardings
from bltjax.families import family_of
from bltjax.inference.entropy import EntropyModel, load_entropy_model
from bltjax.system.paths import path_of
from bltjax.text.tokens import load_tokens
from bltjax.training.step import StepParts, step_parts
from bltjax.weights import workdir as ckpt
from bltjax.weights.export import load_params, open_stored
from bltjax.weights.released.llama import llama_leaves
from bltjax.weights.workdir import TOKENIZER

MOST_MESHES = 4  # that a message names


def entropy_model(config: RunConfig, workdir: Path) -> EntropyModel | None:
    """The byte LM that scored a BLT's data; None for runs whose patches don't depend on entropies.

    A resumed run uses its own copy.
    """
    if not model_config(config).by_entropy:
        return None
    if not config.entropy_model:
        raise ValueError(
            "entropy patching needs the byte LM that scored the data:"
            " --config.entropy_model=WORKDIR of its training run"
        )
    source = workdir / "byte_lm" if ckpt.saved_steps(workdir) else config.entropy_model
    return load_entropy_model(source, newline_reset=config.patching.newline_reset)


def check_start(config: RunConfig, workdir: Path, resumes: bool) -> None:
    """Raises ValueError if the initial weights can't be read or don't fit."""
    # realpath removes a slash at the end, also of a bucket's path.
    if config.init_from and os.path.realpath(config.init_from) == os.path.realpath(str(workdir)):
        raise ValueError(
            f"init_from is {config.init_from}, the work directory itself: leave it out to resume"
            " that run, or give a new run another --workdir"
        )
    if resumes:
        return
    if config.latent_init.path:
        llama_leaves(path_of(config.latent_init.path), config.model.latent)
    if config.init_from:
        found = changes(open_stored(config.init_from).config.model, config.model)
        # Settings that may change on resume, such as remat, don't affect weights either.
        lines = [
            str(change) for change in found if change.rule != MAY_CHANGE and not same_file(change)
        ]
        if lines:
            raise ValueError(
                f"{config.init_from} holds a model with other settings (its value -> yours):\n  "
                + "\n  ".join(lines)
            )


def same_file(change) -> bool:
    """Whether a setting names another file with the same contents."""
    if change.rule != SAME_CONTENT:
        return False
    paths = [path_of(str(path)) for path in (change.old, change.new)]
    return all(path.is_file() for path in paths) and len({checksum(path) for path in paths}) == 1


def mesh_and_parts(config: RunConfig) -> tuple[Mesh, StepParts]:
    """The mesh of all devices, and the parts of a run on it.

    Raises:
      ValueError: where the mesh doesn't fit, with the rule, both numbers and the meshes that would.
    """
    try:
        mesh = make_mesh(config.mesh)
        return mesh, step_parts(config, mesh)
    except ValueError as error:
        raise ValueError(f"{error}{mesh_advice(config, jax.devices())}") from None


def mesh_advice(config: RunConfig, devices: list) -> str:
    """Config changes for a mesh of these devices; empty if the run's mesh fits."""
    count, accumulate = len(devices), config.optimizer.grad_accum_steps
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shapes = model_shapes(config)

    def fits(rows: int | None, mesh) -> None:
        check_mesh(config.model, rows, mesh)
        tree_shardings(shapes, mesh)
        if mesh.shape["data"] % slices:
            raise ValueError("slices")

    def options(mesh) -> str:
        sizes = dataclasses.asdict(mesh).items()
        return " ".join(f"--config.mesh.{axis}={size}" for axis, size in sizes)

    with_rows = functools.partial(fits, config.data.batch_size // accumulate)
    found = fitting_meshes(count, with_rows)
    if found:
        asked = dataclasses.astuple(config.mesh)
        for mesh in map(dataclasses.astuple, found):
            if all(size in (-1, there) for size, there in zip(asked, mesh, strict=True)):
                return ""
        kinds = "\n  ".join(map(options, found[:MOST_MESHES]))
        return f"\nMeshes of {count} devices that fit this config:\n  {kinds}"
    advice = f"\nNo mesh of {count} devices fits this config"
    for mesh in fitting_meshes(count, functools.partial(fits, None))[:1]:
        unit = mesh.data * mesh.fsdp * accumulate
        rows = max(unit, round(config.data.batch_size / unit) * unit)
        advice += f"; one does with --config.data.batch_size={rows} {options(mesh)}"
    for fewer in range(count - 1, 0, -1):
        if fewer % slices == 0 and fitting_meshes(fewer, with_rows):
            return f"{advice}; one of {fewer} does as it is"
    return advice


def check_copies(
    run: RunConfig, config: RunConfig, workdir: Path, byte_lm: EntropyModel | None
) -> list[str]:
    """Checks that new paths of a resumed run's byte LM and tokenizer have the same contents as its
    own copies; returns lines for the log.

    Raises:
      ValueError: if the contents differ.
    """

    def identity(path) -> str:
        return load_entropy_model(path, newline_reset=config.patching.newline_reset).identity

    lines = []
    for change in changes(run, config):
        if change.rule != SAME_CONTENT:
            continue
        path, label = path_of(str(change.new)), f"{change.path}: {change.new}"
        if change.path == "entropy_model" and byte_lm is not None:
            copy, content = byte_lm.identity, identity
        elif change.path.endswith(".tokenizer"):
            copy, content = checksum(path_of(workdir) / TOKENIZER), checksum
        else:
            continue
        if not path.exists():
            lines.append(f"{label} does not exist; the run's own copy is used")
        elif (given := content(path)) == copy:
            lines.append(f"{label} is the same as the run's own copy, which is used")
        else:
            raise ValueError(
                f"{change}: {change.new} is another one ({given}) than that of the run ({copy}), of"
                f" which {workdir} keeps a copy. Give the same settings to resume it, or begin a"
                " new run in another --workdir."
            )
    return lines


def checksum(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def started(config: RunConfig, params, shardings):
    """Fresh parameters, replaced by the initial weights if any are given."""
    if config.init_from:
        loaded = load_params(config.init_from, shardings, jnp.float32)
        print(f"starts from the parameters of {config.init_from}, step {loaded.step}")
        return loaded.params
    if not config.latent_init.path:
        return params
    leaves = llama_leaves(path_of(config.latent_init.path), config.model.latent)
    blocks = params["latent"].pop("blocks")  # freed before the others come
    for name in blocks:
        blocks[name] = stacked_on_devices(
            leaves[f"latent/blocks/{name}"], shardings["latent"]["blocks"][name]
        )
    params["latent"]["blocks"] = blocks
    print(
        f"the latent transformer starts from {config.latent_init.path}: its learning rate is"
        f" {config.latent_init.lr_multiplier} of the others', from step"
        f" {config.latent_init.frozen_steps} on"
    )
    return params


def stacked_on_devices(leaf, sharding):
    """A stored leaf of stacked layers as a float32 array; a process reads its devices' part."""

    def part(index):
        layers = range(leaf.shape[0])[index[0]]
        rows = slice(*index[1].indices(leaf.shape[1]))
        found = [leaf.read((layer,), rows)[(slice(None), *index[2:])] for layer in layers]
        return np.stack(found).astype(np.float32)

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def with_measured_row(config: RunConfig, workdir: Path) -> RunConfig:
    """The settings with the positions of a row of tokens: those of the run that is resumed, or as
    many as the training text needs.

    Raises:
      ValueError: for a model of tokens without a tokenizer, or with another model's.
    """
    if family_of(config).rows != "tokens":
        return config
    if not config.data.max_patches and ckpt.saved_steps(workdir):
        row = ckpt.read_run_config(workdir).data.max_patches
        data = dataclasses.replace(config.data, max_patches=row)
        return dataclasses.replace(config, data=data)
    if not tokenizer_of(config):
        raise ValueError(
            f"config.{config.model.group}.tokenizer is empty: give a tokenizer.json; `python -m"
            " bltjax tokenizer` trains one"
        )
    load_tokens(tokenizer_of(config)).check_model(config.model.vocabulary)
    data = with_positions(config.data, tokenizer_of(config))
    return dataclasses.replace(config, data=data)


def rows_of_run(config: RunConfig, workdir: Path) -> Rows:
    """The description of a run's rows.

    A resumed run uses its own copy of a tokenizer, whatever happened to the original.
    """
    model = model_config(config)
    if ckpt.saved_steps(workdir):
        model = with_tokenizer(model, workdir / TOKENIZER)
    return rows_of(model)
