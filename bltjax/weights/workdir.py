"""Work directories: the files of a run, and how they are found again.

WORKDIR/
  config.json                the resolved config; resume.py has the rules for resuming with others
  metrics.jsonl              one line per report; TensorBoard events beside it
  goodput.json               seconds by kind of work, over all restarts
  checkpoints/STEP/          written completely or not at all (checkpoint.py)
  damaged/STEP/              checkpoints that could not be restored
  byte_lm/                   BLT in entropy mode: the byte LM that placed its patches, as a
                             work directory of its own, so that the two travel together
"""

import contextlib
import hashlib
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from bltjax.config.fields import to_dict
from bltjax.config.run import RunConfig
from bltjax.configured import from_json, run_layout
from bltjax.distributed.coordinator import process_index
from bltjax.family import Model
from bltjax.model.params import is_norm
from bltjax.system.paths import is_remote
from bltjax.system.storage import parse_json, read_json, write_text

TOKENIZER = "tokenizer.json"  # for bpe patching, in exports and work directories alike
METRICS = "metrics.jsonl"


def is_number(value) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def whole_lines(path: epath.Path | Path) -> list[tuple[str, dict]]:
    """The reports of metrics.jsonl, as lines and as values; logs the number of damaged lines."""
    found, damaged = [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        if not line:
            continue
        try:
            report = parse_json(line, "")
            whole = type(report.get("step")) is int and is_number(report["step"])
        except ValueError:  # by a process killed while writing, or by a disk
            whole = False
        if whole:
            found.append((line.decode("utf-8-sig"), report))
        damaged += not whole
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out", file=sys.stderr)
    return found


def read_reports(path: epath.Path | Path) -> list[dict]:
    """The numbers of every complete line of metrics.jsonl, each with its `step`."""
    return [
        {name: value for name, value in report.items() if is_number(value)}
        for _, report in whole_lines(path)
    ]


CHUNK_BYTES = 64 << 20
COMMIT = "commit_success.txt"  # Orbax's name
CONFIG = "config.json"


def sealed(values: dict) -> dict:
    """Values for a JSON file, with their checksum, which `unsealed` compares."""
    return values | {"crc32": checksum_of_json(values)}


def unsealed(values: Any, name: str) -> dict:
    """The values of a sealed JSON file.

    Raises:
      ValueError: naming the file if the checksum differs.
    """
    found = dict(values) if isinstance(values, dict) else {}
    checksum = found.pop("crc32", None)
    if checksum != checksum_of_json(found):
        raise ValueError(f"{name} is not what was saved: another checksum")
    return found


def checksum_of_json(values: dict) -> int:
    read_back = json.loads(json.dumps(values))  # keys are strings then
    return zlib.crc32(json.dumps(read_back, sort_keys=True).encode())


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints.

    Orbax gives a folder its number only when it is complete; in a bucket, which can't rename, it
    writes a marker file last.
    """
    if not is_remote(workdir):
        try:  # glob would find nothing in an unreadable folder
            names = os.listdir(workdir / "checkpoints")
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name) for name in names if name.isdigit())
    folders = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    parts = ("", "params")  # of a run's checkpoint, and of parameters alone
    folders = [p for p in folders if any((p / part / COMMIT).exists() for part in parts)]
    return sorted(int(p.name) for p in folders)


def write_config(workdir: Path, config: RunConfig) -> None:
    write_text(workdir / CONFIG, json.dumps(to_dict(config), indent=1) + "\n")


def read_run_config(workdir: Path) -> RunConfig:
    """The config of a run. Raises ValueError if it is missing, damaged or of another version."""
    return from_json(config_values(workdir), workdir / CONFIG)


def config_values(workdir: Path) -> dict:
    """The JSON object of a run's config.json, unchecked.

    Raises:
      ValueError: naming the file and the way out, if it is missing or holds something else.
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


def newest_progress(workdir: Path) -> dict:
    """The newest intact progress/ of a run's checkpoints; empty if there is none."""
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
    """Orbax options for a process that reads or writes without the others."""
    me = process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def reader() -> ocp.StandardCheckpointer:
    return ocp.StandardCheckpointer(multiprocessing_options=alone())


def stored_shapes(folder: Path) -> dict:
    """Nested dicts of Orbax's metadata (shape, dtype) of each array in a folder of parameters."""
    with quiet(), reader() as checkpointer:
        return dict(checkpointer.metadata(folder.absolute()).item_metadata)


def restore_params(folder: Path, shardings=None, dtype=None) -> dict:
    """The parameters that Orbax wrote to `folder`, each on its sharding (default: one device), and
    in `dtype` (default: as stored), except norms, which are few and keep their dtype."""
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


def save_params(workdir: epath.Path, model: Model, step: int) -> None:
    """Writes a work directory of a model's parameters alone, from one process; overwrites."""
    workdir = epath.Path(workdir)
    workdir.rmtree(missing_ok=True)
    workdir.mkdir(parents=True)
    with reader() as checkpointer:
        path = (workdir / "checkpoints" / str(step) / "params").absolute()
        checkpointer.save(path, jax.device_get(model.params), force=True)
    write_text(workdir / CONFIG, json.dumps(run_layout(model.config), indent=1) + "\n")


@contextlib.contextmanager
def quiet():
    """Silences absl's warnings: it is fine that one item of a checkpoint has no metadata of its
    own."""
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(level)


def identity(params) -> str:
    """A checksum of parameters, by which records identify the model that scored them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]
