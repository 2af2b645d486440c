"""Checkpoints: a training state and its data streams, saved by all processes.

    WORKDIR/checkpoints/STEP/   gets its number as a name only after every process wrote its part
      params/  opt/             arrays: a process writes what its devices hold
      streams/                  JSON, one file per stream, by the process that builds its rows
      progress/                 JSON: step, config, checksums of the arrays, held-out bits per byte
    WORKDIR/damaged/STEP/       a checkpoint that could not be restored: moved, never deleted

The checksums are taken of the arrays on the devices, and compared with those of the restored arrays
(restore.py). So damage anywhere in between is detected, whatever the files say.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from bltjax.config.run import FaultsConfig, RunConfig
from bltjax.distributed.coordinator import process_count
from bltjax.distributed.processes import compile_in_lockstep, describe, exit_now, lost_another
from bltjax.training.step import TrainState
from bltjax.weights.damage import FORMAT, stored_name, unsealed_file
from bltjax.weights.workdir import in_chunks, sealed

SAVE_SECONDS = 1200  # for all processes to write their parts


@contextlib.contextmanager
def failure_ends_process():
    """Context that ends the process on an error inside it, in a run of several processes.

    Orbax would raise the error only after all processes reach its next barrier. Those that wrote
    their parts wait at another, so all would hang for SAVE_SECONDS.
    """
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds
        # The loop itself detects the loss of another process.
        if process_count() > 1 and not lost_another(error):
            exit_now(1, f"a checkpoint can't be written: {describe(error)}")
        raise


class Writing(Future):
    """A part of a checkpoint being written; its failure ends the process."""

    def __init__(self, commit: Future):
        self.commit = commit

    def result(self, timeout: float | None = None):
        with failure_ends_process():
            return self.commit.result(timeout)

    def cancel(self) -> bool | None:
        return self.commit.cancel()


class Watched(ocp.AsyncCheckpointHandler):
    """A wrapper of an item's handler that detects a part which can't be written."""

    async def async_save(self, directory, *args, **options) -> list[Writing]:
        commits = await super().async_save(directory, *args, **options)
        return [Writing(commit) for commit in commits or ()]

    def finalize(self, directory) -> None:
        with failure_ends_process():
            super().finalize(directory)

    @classmethod
    def typestr(cls) -> str:
        """The name in a checkpoint's metadata: that of the wrapped handler, which can read it."""
        handler = cls.__mro__[cls.__mro__.index(Watched) + 1]
        return f"{handler.__module__}.{handler.__qualname__}"


class WatchedArrays(Watched, ocp.StandardCheckpointHandler):
    pass


class WatchedJson(Watched, ocp.JsonCheckpointHandler):
    pass


class StreamsHandler(ocp.AsyncCheckpointHandler):
    """Streams' states, one file each; a process writes and reads those of its rows."""

    def save(self, directory, args: "StreamsSave") -> None:
        for number, state in args.states.items():
            (directory / f"{number}.json").write_text(json.dumps(sealed(state)), encoding="utf-8")

    async def async_save(self, directory, args: "StreamsSave"):
        async def write() -> None:
            self.save(directory, args)

        return [CommitFutureAwaitingContractedSignals(write(), name="streams")]

    def restore(self, directory, args: "StreamsRestore") -> dict[str, dict]:
        return {
            str(number): unsealed_file(directory / f"{number}.json", f"streams/{number}.json")
            for number in args.numbers
        }


@ocp.args.register_with_handler(StreamsHandler, for_save=True)
@dataclasses.dataclass
class StreamsSave(ocp.args.CheckpointArgs):
    states: dict[str, dict]


@ocp.args.register_with_handler(StreamsHandler, for_restore=True)
@dataclasses.dataclass
class StreamsRestore(ocp.args.CheckpointArgs):
    numbers: list[int]


class WatchedStreams(Watched, StreamsHandler):
    pass


def make_manager(workdir: Path, config: RunConfig) -> ocp.CheckpointManager:
    """Saves asynchronously; keeps the newest checkpoints, and those that are kept permanently."""
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("params", ocp.args.StandardSave, WatchedArrays())
    handlers.add("opt", ocp.args.StandardSave, WatchedArrays())
    handlers.add("streams", StreamsSave, WatchedStreams())
    handlers.add("progress", ocp.args.JsonSave, WatchedJson())
    policies = [preserve.LatestN(config.checkpoint.keep)]
    if config.checkpoint.keep_every is not None:
        policies.append(preserve.EveryNSteps(config.checkpoint.keep_every))
    # Named processes meet at the coordinator. Otherwise they would by collective operations, which
    # must not come between those of the steps.
    everyone = set(range(process_count())) if process_count() > 1 else None
    # If made asynchronously, folders may not exist yet when a process writes its streams: it checks
    # once whether to wait, possibly before process 0 has announced it. Its part would be missing,
    # and the others would wait for it for SAVE_SECONDS.
    writing = ocp.options.AsyncOptions(
        timeout_secs=SAVE_SECONDS, create_directories_asynchronously=False
    )
    folder = workdir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(
        folder.absolute(),
        handler_registry=handlers,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies),
            create=False,
            cleanup_tmp_directories=True,  # truncated files
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=everyone),
            async_options=writing,
        ),
    )


@compile_in_lockstep
@jax.jit
def checksums(tree) -> list[jax.Array]:
    """uint32 of each leaf, which changes if any one element changes."""

    def of_leaf(leaf):
        width = leaf.dtype.itemsize * 8
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        factor = jnp.uint32(1)  # odd everywhere, so that no change is multiplied by zero
        for axis in range(leaf.ndim):
            position = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            factor = factor + position * jnp.uint32(2 * (axis * 7919 + 1))
        return (bits * factor).sum(dtype=jnp.uint32)

    return [of_leaf(leaf) for leaf in jax.tree.leaves(tree)]


def named_leaves(tree) -> dict[str, Any]:
    """Leaves by jax's name for them, `.params['encoder']['bytes_VE']`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def named_checksums(state: TrainState) -> dict[str, int]:
    names = named_leaves(state)
    return dict(zip(names, map(int, jax.device_get(checksums(state))), strict=True))


def shapes_of(tree) -> dict[str, str]:
    """Dtype and shape of every leaf, `float32 (260, 16)`, by its stored name."""
    return {
        stored_name(name): f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}"
        for name, leaf in named_leaves(tree).items()
    }


def save(
    manager: ocp.CheckpointManager, state: TrainState, streams: dict[str, dict], progress: dict
) -> None:
    """Starts an asynchronous save, in every process; arrays are copied first, so training may
    continue.

    streams: states of this process' streams.
    progress: JSON, with `step`.
    """
    arrays = {"checksums": named_checksums(state), "shapes": shapes_of(state)}
    progress = sealed({"format": FORMAT, **arrays, **progress})
    manager.save(
        int(progress["step"]),
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params, save_args=in_chunks(state.params)),
            opt=ocp.args.StandardSave(state.opt),
            streams=StreamsSave(streams),
            progress=ocp.args.JsonSave(progress),
        ),
    )


def last_good(manager: ocp.CheckpointManager, workdir: Path, faults: FaultsConfig) -> str:
    """The message for a run that bad batches ended: the checkpoints left, and the next step.

    faults: the settings with which it ended.
    """
    manager.wait_until_finished()
    step = manager.latest_step()
    if step is None:
        return (
            f"Last good checkpoint: none in {workdir / 'checkpoints'}.\nA lower"
            " --config.optimizer.lr or a longer warm-up usually helps, and"
            " --config.faults.bad_batch=skip leaves such batches out. As nothing is saved, the"
            " same --workdir takes any settings."
        )
    more = "bad_batch=skip" if faults.bad_batch == "stop" else f"most_skips={2 * faults.most_skips}"
    return (
        f"Last good checkpoint: step {step} in {workdir / 'checkpoints'}.\nThe same command with"
        f" --config.faults.{more} resumes there and leaves such batches out. A lower"
        " --config.optimizer.lr or a longer warm-up usually helps, too, but is a new run: another"
        f" --workdir, which begins with these weights by --init_from={workdir}."
    )
