"""Work directories: what a run leaves behind, and how it is found again.

WORKDIR/
  config.json                the resolved config; a run with another config is refused
  metrics.jsonl              one line per report; TensorBoard events beside it
  checkpoints/STEP/          written whole or not at all, by Orbax
    params/  opt/            arrays
    progress/                JSON: step, data streams, config, held-out bits per byte
  byte_lm/                   BLT in entropy mode: the byte LM that placed its patches, as a
                             work directory of its own, so that the two travel together
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from bltjax.config import RunConfig, differences, from_dict, to_dict
from bltjax.storage import write_text

CHUNK_BYTES = 64 << 20


class TrainState(NamedTuple):
    """Everything that a step reads and writes: a pytree of arrays."""

    step: jax.Array
    params: Any
    opt: Any


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints; Orbax gives a number to a folder only when it is whole."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """Creates the directory, or checks that what was trained in it had the same config.

    A run that never came to a checkpoint has nothing to lose, so its directory may be taken.

    Raises:
      ValueError: with the differing settings, if the directory belongs to another config.
      OSError: if it cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / ".writable", "")
    (workdir / ".writable").unlink()
    if not saved_steps(workdir):
        return
    lines = differences(to_dict(read_config(workdir)), to_dict(config))
    if lines:
        raise ValueError(
            f"{workdir} holds a run with another config (its value -> yours):\n  "
            + "\n  ".join(lines)
            + "\nGive the same settings to resume it, or another --workdir to start afresh."
        )


def write_config(workdir: Path, config: RunConfig) -> None:
    write_text(workdir / "config.json", json.dumps(to_dict(config), indent=1) + "\n")


def read_config(workdir: Path) -> RunConfig:
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(
            f"{workdir} is neither a training run nor an export: no {path.name} and no export.json"
            " in it"
        )
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def make_manager(workdir: Path, config: RunConfig) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(),
        item_names=("params", "opt", "progress"),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.keep, enable_async_checkpointing=True
        ),
    )


def save(manager: ocp.CheckpointManager, state: TrainState, progress: dict) -> None:
    """Starts writing the state and its progress; arrays are copied first, so training may go on."""
    manager.save(
        int(progress["step"]),
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params, save_args=in_chunks(state.params)),
            opt=ocp.args.StandardSave(state.opt),
            progress=ocp.args.JsonSave(progress),
        ),
    )


def in_chunks(params):
    """Chunks on disk that can be read one by one, whatever a device held."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)


@contextlib.contextmanager
def reading(folder: Path):
    """Says which checkpoint is damaged, and what to do, instead of how Orbax noticed."""
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        way_out = "Write that export again."
        if folder.parent.parent.name == "checkpoints" or folder.parent.name == "checkpoints":
            way_out = "Remove that folder to go on from the one before it, if there is one."
        raise ValueError(f"{folder} can't be read: {reason[0][:200]}\n{way_out}") from error


def restore(
    manager: ocp.CheckpointManager, workdir: Path, state: TrainState
) -> tuple[TrainState, dict]:
    """The newest checkpoint, on the shardings of `state` (arrays or shapes), and its progress.

    Raises:
      ValueError: naming the checkpoint, if it is damaged.
    """
    step = manager.latest_step()
    with reading(workdir / "checkpoints" / str(step)):
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(state.params),
                opt=ocp.args.StandardRestore(state.opt),
                progress=ocp.args.JsonRestore(),
            ),
        )
    step = jax.device_put(np.int32(step), state.step.sharding)
    return TrainState(step, restored["params"], restored["opt"]), restored["progress"]


def newest_checkpoint(workdir: Path) -> tuple[Path, int]:
    """The folder and the step of a run's newest checkpoint.

    Raises:
      ValueError: if there is none yet.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} has no checkpoint yet; run the training command to its end")
    return workdir / "checkpoints" / str(steps[-1]), steps[-1]


def stored_shapes(folder: Path) -> dict:
    """Nested dicts of what Orbax knows of each array (shape, dtype) in a folder of parameters."""
    with quiet(), ocp.StandardCheckpointer() as checkpointer:
        return dict(checkpointer.metadata(folder.absolute()).item_metadata)


def restore_params(folder: Path, shardings=None, dtype=None) -> dict:
    """The parameters that Orbax wrote to `folder`, each on its sharding (default: one device)."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = stored_shapes(folder)
    if shardings is None:
        shardings = jax.tree.map(lambda _: one, shapes)
    target = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
    with quiet(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), target)


def save_params(workdir: Path, config: RunConfig, params, step: int) -> None:
    """A work directory with parameters alone; replaces what is there."""
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        path = (workdir / "checkpoints" / str(step) / "params").absolute()
        checkpointer.save(path, params, force=True)
    write_config(workdir, config)


@contextlib.contextmanager
def quiet():
    """Without absl's warnings: that one item of a checkpoint has no metadata of its own is fine."""
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(level)


def identity(params) -> str:
    """A checksum of parameters, by which data remembers the model that scored it."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]
