"""Work directories: what a run leaves behind, and how it is found again.

WORKDIR/
  config.json                the resolved config; with which others it is resumed, resume.py says
  metrics.jsonl              one line per report; TensorBoard events beside it
  goodput.json               seconds by what they went into, over all restarts
  checkpoints/STEP/          written whole or not at all (saving.py)
  damaged/STEP/              what could not be restored
  byte_lm/                   BLT in entropy mode: the byte LM that placed its patches, as a
                             work directory of its own, so that the two travel together
"""

import contextlib
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from bltjax.config.run import RunConfig, from_json, to_dict
from bltjax.distributed.coordinator import process_index
from bltjax.distributed.processes import from_writer, gathered, is_writer
from bltjax.model import is_norm
from bltjax.system.storage import (
    check_arrays_path,
    check_unused,
    check_writable,
    is_remote,
    read_json,
    write_text,
)
from bltjax.training.resume import check_settings

CHUNK_BYTES = 64 << 20
COMMIT = "commit_success.txt"  # Orbax's name
CONFIG = "config.json"


def sealed(values: dict) -> dict:
    """Values for a JSON file, with a checksum of them, which `unsealed` compares."""
    return values | {"crc32": checksum_of_json(values)}


def unsealed(values: Any, name: str) -> dict:
    """The values of a JSON file as they were sealed.

    Raises:
      ValueError: naming the file if they are not.
    """
    found = dict(values) if isinstance(values, dict) else {}
    checksum = found.pop("crc32", None)
    if checksum != checksum_of_json(found):
        raise ValueError(f"{name} is not what was saved: another checksum")
    return found


def checksum_of_json(values: dict) -> int:
    read_back = json.loads(json.dumps(values))  # keys are strings then
    return zlib.crc32(json.dumps(read_back, sort_keys=True).encode())


class TrainState(NamedTuple):
    """Everything that a step reads and writes: a pytree of arrays."""

    step: jax.Array
    params: Any
    opt: Any


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints.

    Orbax gives a number to a folder only when it is whole; in a bucket, which can't rename, it
    writes a file last.
    """
    if not is_remote(workdir):
        try:  # glob would find nothing in a folder that may not be read
            names = os.listdir(workdir / "checkpoints")
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name) for name in names if name.isdigit())
    folders = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    parts = ("", "params")  # of a run's checkpoint, and of parameters alone
    folders = [p for p in folders if any((p / part / COMMIT).exists() for part in parts)]
    return sorted(int(p.name) for p in folders)


def check_workdir(workdir: Path, config: RunConfig) -> RunConfig | None:
    """Creates the directory, or checks that `config` may resume the run in it.

    A run that never came to a checkpoint has nothing to lose, so its directory may be taken.
    Returns the config of the run that is to be resumed, None if there is none. Every process calls
    this.

    Raises:
      ValueError: with the settings that differ, if the directory belongs to another config; or if
        the processes don't share it.
      OSError: if it cannot be written.
    """
    mark = workdir / "checkpoints" / ".writable"
    run = from_writer("checking the work directory", lambda: begin_workdir(workdir, config, mark))
    problem = ""
    try:
        if not mark.exists():
            problem = f"{workdir} is not the folder that process 0 sees: all must share one"
        own = mark.with_name(f".writable-{process_index()}")
        own.write_text("", encoding="utf-8")
        own.unlink()
    except OSError as error:
        problem = str(error)
    problems = gathered("checking the work directory", problem)
    if is_writer():
        mark.unlink()
    for index, problem in enumerate(problems):
        if problem:
            raise ValueError(f"process {index}: {problem}")
    return run and from_json(run, workdir / CONFIG)


def check_place(workdir: Path) -> None:
    """Raises ValueError if a run can't be in a folder, for its name or for what else is there."""
    check_arrays_path(workdir)
    check_unused(workdir, by="a run")


def begin_workdir(workdir: Path, config: RunConfig, mark: Path) -> dict | None:
    """Makes the directory and `mark` in it; the config of the run that is there, as JSON."""
    check_writable(mark.parent)  # found now, not at the first checkpoint
    mark.write_text("", encoding="utf-8")
    if not saved_steps(workdir):
        return None
    _, step = newest_checkpoint(workdir)
    run = from_json(config_or_saved_one(workdir), workdir / CONFIG)
    check_settings(run, config, workdir, step)
    return to_dict(run)


def write_config(workdir: Path, config: RunConfig) -> None:
    write_text(workdir / CONFIG, json.dumps(to_dict(config), indent=1) + "\n")


def read_config(workdir: Path) -> RunConfig:
    """Raises ValueError if there is none, or it is damaged or of another version."""
    return from_json(config_values(workdir), workdir / CONFIG)


def config_values(workdir: Path) -> dict:
    """The JSON object of a run's config.json, unchecked.

    Raises:
      ValueError: naming the file and the way out, if it isn't there or holds something else.
    """
    path = workdir / CONFIG
    if not path.exists() and not saved_steps(workdir):
        raise ValueError(
            f"{workdir} is neither a training run nor an export: no {path.name} and no export.json"
            " in it"
        )
    try:
        return read_json(path)
    except FileNotFoundError:
        problem = f"{path} is missing"
    except ValueError as error:
        problem = str(error)
    if "config" in newest_progress(workdir):
        problem += (
            ".\nThe run's newest checkpoint has its settings too: the training command, given"
            " again, writes the file anew."
        )
    raise ValueError(problem)


def config_or_saved_one(workdir: Path) -> dict:
    """A run's config as JSON: of config.json, or, if that is damaged, of the newest checkpoint."""
    try:
        return config_values(workdir)
    except ValueError as error:
        progress = newest_progress(workdir)
        if "config" not in progress:
            raise
        reason = str(error).splitlines()[0].removesuffix(".")
        print(f"{reason}; the settings are those in the checkpoint of step {progress['step']}")
        return progress["config"]


def newest_progress(workdir: Path) -> dict:
    """The newest progress/ of a run's checkpoints (saving.py) that is whole; empty if none is."""
    for step in reversed(saved_steps(workdir)):
        try:
            path = workdir / "checkpoints" / str(step) / "progress" / "metadata"
            progress = read_json(path)
            return unsealed(progress, str(path)) if "crc32" in progress else progress
        except (OSError, ValueError):
            continue
    return {}


def in_chunks(params):
    """Chunks on disk that can be read one by one, whatever a device held."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)


def newest_checkpoint(workdir: Path) -> tuple[Path, int]:
    """The folder and the step of a run's newest checkpoint.

    Raises:
      ValueError: if there is none yet.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} has no checkpoint yet; run the training command to its end")
    return workdir / "checkpoints" / str(steps[-1]), steps[-1]


def alone() -> ocp.options.MultiprocessingOptions:
    """For what a process reads or writes without the others."""
    me = process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def reader() -> ocp.StandardCheckpointer:
    return ocp.StandardCheckpointer(multiprocessing_options=alone())


def stored_shapes(folder: Path) -> dict:
    """Nested dicts of what Orbax knows of each array (shape, dtype) in a folder of parameters."""
    with quiet(), reader() as checkpointer:
        return dict(checkpointer.metadata(folder.absolute()).item_metadata)


def restore_params(folder: Path, shardings=None, dtype=None) -> dict:
    """The parameters that Orbax wrote to `folder`, each on its sharding (default: one device), and
    in `dtype` (default: as stored), but for norms, which are few and are never narrowed."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = stored_shapes(folder)
    if shardings is None:
        shardings = jax.tree.map(lambda _: one, shapes)

    def target_of(path, leaf, where):
        wanted = jnp.dtype(dtype or leaf.dtype)
        if is_norm(path):
            wanted = jnp.promote_types(wanted, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, wanted, sharding=where)

    target = jax.tree_util.tree_map_with_path(target_of, shapes, shardings)
    with quiet(), reader() as checkpointer:
        return checkpointer.restore(folder.absolute(), target)


def save_params(workdir: epath.Path, config: RunConfig, params, step: int) -> None:
    """A work directory with parameters alone, of one process; replaces what is there."""
    workdir = epath.Path(workdir)
    workdir.rmtree(missing_ok=True)
    workdir.mkdir(parents=True)
    with reader() as checkpointer:
        path = (workdir / "checkpoints" / str(step) / "params").absolute()
        checkpointer.save(path, jax.device_get(params), force=True)
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
