"""A training state and its data streams: saved by all processes, restored by any number of them.

    WORKDIR/checkpoints/STEP/   has its number for a name only when every process wrote its part
      params/  opt/             arrays: a process writes what its devices hold
      streams/                  JSON, a file for each stream, by the process that builds its rows
      progress/                 JSON: step, config, checksums of the arrays, held-out bits per byte
    WORKDIR/damaged/STEP/       a checkpoint that could not be restored: moved, never deleted

The checksums are of the arrays as they were on the devices, and are compared with those of what has
been restored: so damage anywhere in between is found, whatever the files say. Damage is a checksum
that is another, a file that is missing, a format that can't be read. Whatever else keeps a
checkpoint from being restored (no permission, no memory, a file server that is away, settings that
ask for other arrays) ends the run, and the checkpoint stays where it is.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from bltjax.config.run import FaultsConfig, RunConfig
from bltjax.distributed.coordinator import process_count
from bltjax.distributed.messages import says
from bltjax.distributed.processes import (
    Restart,
    describe,
    from_writer,
    gathered,
    leave,
    lost_another,
    together,
)
from bltjax.system.storage import read_json
from bltjax.weights.workdir import (
    TrainState,
    in_chunks,
    quiet,
    reader,
    saved_steps,
    sealed,
    stored_shapes,
    unsealed,
)

FORMAT = 3  # of progress/; another one is refused, not taken for damage
SAVE_SECONDS = 1200  # for all processes to write their parts


@contextlib.contextmanager
def failure_ends_process():
    """Ends the process if what is done in it fails, in a run of several processes.

    Orbax raises such an error once all processes have come to its next barrier. Those that wrote
    their parts wait at another, so that all would stand still for SAVE_SECONDS.
    """
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds
        # The loop itself finds out that another process was lost.
        if process_count() > 1 and not lost_another(error):
            leave(1, f"a checkpoint can't be written: {describe(error)}")
        raise


class Writing(Future):
    """A part of a checkpoint that is being written; its failure ends the process."""

    def __init__(self, commit: Future):
        self.commit = commit

    def result(self, timeout: float | None = None):
        with failure_ends_process():
            return self.commit.result(timeout)

    def cancel(self) -> bool | None:
        return self.commit.cancel()


class Watched(ocp.AsyncCheckpointHandler):
    """Stands before the handler of an item, so that a part which can't be written is noticed."""

    async def async_save(self, directory, *args, **options) -> list[Writing]:
        commits = await super().async_save(directory, *args, **options)
        return [Writing(commit) for commit in commits or ()]

    def finalize(self, directory) -> None:
        with failure_ends_process():
            super().finalize(directory)

    @classmethod
    def typestr(cls) -> str:
        """The name in a checkpoint's metadata: that of the handler itself, which can read it."""
        handler = cls.__mro__[cls.__mro__.index(Watched) + 1]
        return f"{handler.__module__}.{handler.__qualname__}"


class WatchedArrays(Watched, ocp.StandardCheckpointHandler):
    pass


class WatchedJson(Watched, ocp.JsonCheckpointHandler):
    pass


class Damaged(ValueError):
    """Files that aren't what was saved."""


class Misfit(ValueError):
    """A checkpoint that is whole, but not of what this run or this version of bltjax asks for."""


def unsealed_file(path: Path, name: str) -> dict:
    """Raises Damaged, naming the file."""
    try:
        return unsealed(read_json(path), name)
    except ValueError as error:
        raise Damaged(str(error)) from None


class StreamsHandler(ocp.AsyncCheckpointHandler):
    """Streams' states, each in a file of its own; a process writes and reads those of its rows."""

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


def watched_handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("params", ocp.args.StandardSave, WatchedArrays())
    registry.add("opt", ocp.args.StandardSave, WatchedArrays())
    registry.add("streams", StreamsSave, WatchedStreams())
    registry.add("progress", ocp.args.JsonSave, WatchedJson())
    return registry


def make_manager(workdir: Path, config: RunConfig) -> ocp.CheckpointManager:
    """Saves asynchronously; keeps the newest checkpoints, and those that are kept for good."""
    policies = [preserve.LatestN(config.checkpoint.keep)]
    if config.checkpoint.keep_every is not None:
        policies.append(preserve.EveryNSteps(config.checkpoint.keep_every))
    processes = ocp.options.MultiprocessingOptions()
    if process_count() > 1:
        # Named processes meet at the coordinator. Otherwise they would by collective operations,
        # which must not come between those of the steps.
        everyone = set(range(process_count()))
        processes = ocp.options.MultiprocessingOptions(active_processes=everyone)
    # Made asynchronously, folders may not be there when a process writes its streams: it asks once
    # whether there is anything to wait for, and process 0 may not have said so yet. Its part would
    # be missing, and the others would wait for it until SAVE_SECONDS have passed.
    writing = ocp.options.AsyncOptions(
        timeout_secs=SAVE_SECONDS, create_directories_asynchronously=False
    )
    folder = workdir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(
        folder.absolute(),
        handler_registry=watched_handlers(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies),
            create=False,
            cleanup_tmp_directories=True,  # what was cut off
            multiprocessing_options=processes,
            async_options=writing,
        ),
    )


@together
@jax.jit
def checksums(tree) -> list[jax.Array]:
    """uint32 of each leaf: any one element that changes, changes it."""

    def of_leaf(leaf):
        width = leaf.dtype.itemsize * 8
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        factor = jnp.uint32(1)  # odd everywhere, so that no change is multiplied by zero
        for axis in range(leaf.ndim):
            place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            factor = factor + place * jnp.uint32(2 * (axis * 7919 + 1))
        return (bits * factor).sum(dtype=jnp.uint32)

    return [of_leaf(leaf) for leaf in jax.tree.leaves(tree)]


def named_leaves(tree) -> dict[str, Any]:
    """Leaves by what jax calls them, `.params['encoder']['bytes_VE']`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def named_checksums(state: TrainState) -> dict[str, int]:
    names = named_leaves(state)
    return dict(zip(names, map(int, jax.device_get(checksums(state))), strict=True))


def stored_name(path: str) -> str:
    """`.params['encoder']['bytes_VE']`, by which a checksum goes, as `params/encoder/bytes_VE`."""
    return "/".join(re.findall(r"[A-Za-z0-9_]+", path))


def shapes_of(tree) -> dict[str, str]:
    """Dtype and shape of every leaf, `float32 (260, 16)`, by its stored name."""
    return {
        stored_name(name): f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}"
        for name, leaf in named_leaves(tree).items()
    }


def save(
    manager: ocp.CheckpointManager, state: TrainState, streams: dict[str, dict], progress: dict
) -> None:
    """Starts writing, in every process; arrays are copied first, so training may go on.

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


class Restored(NamedTuple):
    state: TrainState
    streams: dict[str, dict]
    progress: dict


def read_progress(folder: Path) -> dict:
    """Raises Misfit for another version's, Damaged, or OSError."""
    path = folder / "progress" / "metadata"
    try:
        progress = read_json(path)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if "crc32" in progress or progress.get("format") == FORMAT:
        progress = unsealed_file(path, "progress")
    if progress.get("format") != FORMAT:
        raise Misfit(
            f"{folder} was written by another version of bltjax (format"
            f" {progress.get('format', 1)}, not {FORMAT}): resume it with that one, or begin anew"
            f" with --init_from={folder.parent.parent}"
        )
    return progress


def check_fits(folder: Path, progress: dict, target: TrainState) -> None:
    """Raises Misfit, naming an array, if `target` isn't of the arrays that were saved."""
    asked = shapes_of(target)
    names = {stored_name(name) for name in progress["checksums"]}
    lines = [f"{name} is in {'it' if name in names else 'the run'} alone"
             for name in sorted(names ^ asked.keys())]  # fmt: skip
    if not lines:
        saved = progress.get("shapes", {})
        with contextlib.suppress(Exception):  # what can't be read is named by restoring it
            saved = saved or stored_shapes_of(folder)
        differing = sorted(x for x in saved.keys() & asked.keys() if saved[x] != asked[x])
        lines = [f"{name}: {saved[name]} -> {asked[name]}" for name in differing]
    if lines:
        more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
        wide = "\njax_enable_x64 is set (JAX_ENABLE_X64); a run is of 32 bits: unset it."
        raise Misfit(
            f"{folder} doesn't hold the arrays that this run asks for (its -> yours):\n  "
            + "\n  ".join([*lines[:3], *more])
            + (wide if jax.config.jax_enable_x64 else "")
        )


def stored_shapes_of(folder: Path) -> dict[str, str]:
    """`shapes_of` a checkpoint whose progress doesn't say it, as older ones: by Orbax's index."""
    found = {}
    for item in ("params", "opt"):
        for name, leaf in named_leaves(stored_shapes(folder / item)).items():
            if leaf.dtype is not None:
                dtype, shape = np.dtype(leaf.dtype).name, tuple(leaf.shape)
                found[f"{item}/{stored_name(name)}"] = f"{dtype} {shape}"
    return found


def restore(folder: Path, target: TrainState, streams: list[int]) -> Restored:
    """A checkpoint on the shardings of `target` (arrays or shapes), with these streams' states.

    A process reads what its devices hold, and waits for no other.

    Raises:
      Damaged: if a file of ours is not what was saved.
      Misfit: if `target` is of other arrays.
      Besides, whatever Orbax and the storage raise; see `reason`.
    """
    progress = read_progress(folder)
    check_fits(folder, progress, target)
    states = StreamsHandler().restore(folder / "streams", StreamsRestore(streams))
    with quiet(), reader() as checkpointer:
        params = checkpointer.restore((folder / "params").absolute(), target.params)
        opt = checkpointer.restore((folder / "opt").absolute(), target.opt)
    step = jax.make_array_from_callback(
        (), target.step.sharding, lambda _: np.asarray(progress["step"], np.int32)
    )
    state = TrainState(step, params, opt)
    return Restored(state, states, progress)


def damage(restored: Restored) -> str:
    """Which arrays are not what was saved; empty if all are. Every process calls this at once."""
    saved, found = (
        {stored_name(name): checksum for name, checksum in checksums.items()}
        for checksums in (restored.progress["checksums"], named_checksums(restored.state))
    )
    wrong = sorted(
        name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name)
    )
    return f"{', '.join(wrong[:3])} is not what was saved" if wrong else ""


def causes(error: BaseException | None) -> Iterator[tuple[BaseException, bool]]:
    """An error, and those behind it: whether each is its cause, or only came before it."""
    known, is_cause = set(), True
    while error is not None and id(error) not in known:
        known.add(id(error))
        yield error, is_cause
        is_cause = is_cause and error.__cause__ is not None
        error = error.__cause__ or error.__context__


class Reason(NamedTuple):
    """Why something can't be restored."""

    kind: str  # "damaged", "away" (later it may be there), "refused", or "unknown"
    text: str


def reason(error: Exception) -> Reason:
    """What an error of Orbax, of its storage or of ours says of the files that were read."""
    found = []
    for cause, is_cause in causes(error):
        kind = kind_of(cause)
        if kind == "damaged" and not is_cause:
            kind = "unknown"  # a file that was missed and wasn't needed
        text = (str(cause).strip().splitlines() or [""])[0].split(" [tensorstore_spec")[0][:300]
        if isinstance(cause, Misfit | OSError):
            text = describe(cause)
        found.append(Reason(kind, text or type(cause).__name__))
    # What doesn't lie in the files counts more than what may follow from it.
    for kind in ("refused", "away", "damaged"):
        for each in found:
            if each.kind == kind:
                return each
    return found[0]


def kind_of(error: BaseException) -> str:
    """A `Reason`'s kind, for one error without its causes."""
    if isinstance(error, Damaged | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return "damaged"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "damaged"
    if isinstance(error, TimeoutError | ConnectionError):
        return "away"
    if isinstance(error, Misfit | OSError | MemoryError):
        return "refused"
    if says(error, "storage away"):
        return "away"
    if says(error, "storage refuses"):
        return "refused"
    # XLA has its own meaning of these, and raises no ValueError.
    named = isinstance(error, ValueError) and says(error, "damaged files")
    return "damaged" if named else "unknown"


def check_index(folder: Path, names: set[str]) -> None:
    """Looks at the index of Orbax' arrays in `folder`, and at their list: JSON of Orbax.

    Raises:
      Damaged: if they can't be read, or name other arrays than these.
    """
    paths = [folder / "_METADATA", *sorted((folder / "array_metadatas").glob("process_*"))]
    for path in paths:
        try:
            values = read_json(path)
            if path.name == "_METADATA":
                found = set()
                for entry in values["tree_metadata"].values():
                    value = entry["value_metadata"]
                    keys = [(part["key"], part["key_type"]) for part in entry["key_metadata"]]
                    if not value["skip_deserialize"] and value["value_type"] != "None":
                        found.add("/".join(str(key) for key, _ in keys))
                if found != names:
                    raise ValueError(f"{path} doesn't name the arrays that were saved")
            else:
                for entry in values["array_metadatas"]:
                    for name in ("param_name", "write_shape", "chunk_shape"):
                        entry["array_metadata"][name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if isinstance(error, ValueError) else f"{path} is no index of arrays"
            raise Damaged(text) from None


def why_not(folder: Path, error: Exception) -> Reason:
    """`reason`, unless Orbax' index of the arrays says more: Orbax hides what it meets there."""
    found = reason(error)
    if found.kind in ("refused", "away"):
        return found
    try:
        names = map(stored_name, read_progress(folder)["checksums"])
        split = [name.partition("/") for name in names]
        for item in ("params", "opt"):
            check_index(folder / item, {name for of, _, name in split if of == item})
    except Exception as error:  # what reading may raise
        more = reason(error)
        return found if more.kind == "unknown" else more
    return found


@contextlib.contextmanager
def reading(folder: Path):
    """Names the checkpoint that can't be read, and what to do, instead of how Orbax noticed."""
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds
        why = reason(error)
        way_out = "Write that export again."
        if folder.parent.parent.name == "checkpoints" or folder.parent.name == "checkpoints":
            way_out = "Remove that folder to go on from the one before it, if there is one."
        if why.kind in ("refused", "away"):
            way_out = "Nothing says that it is damaged: mend the cause, and read it again."
        raise ValueError(f"{folder} can't be read: {why.text[:200]}\n{way_out}") from error


def restore_newest(workdir: Path, target: TrainState, streams: list[int]) -> Restored:
    """The newest checkpoint that every process can restore; damaged ones are moved aside.

    Raises:
      ValueError: naming what is wrong, if none is whole; or if one can't be restored for a reason
        that isn't damage, in any process.
      Restart: if the storage doesn't answer.
    """
    steps = from_writer("looking for checkpoints", lambda: saved_steps(workdir))
    while steps:
        folder, restored, mine = workdir / "checkpoints" / str(steps[-1]), None, None
        try:
            restored = restore(folder, target, streams)
        except Exception as error:  # Orbax and its storage raise many kinds
            mine = why_not(folder, error)
        reasons = [Reason(*r) for r in gathered("restoring a checkpoint", mine) if r]
        if not reasons and (text := damage(restored)):  # of global arrays: alike everywhere
            reasons = [Reason("damaged", text)]
        if not reasons:
            return restored
        others = [each for each in reasons if each.kind != "damaged"]
        if others:
            raise stays(folder, min(others, key=lambda each: each.kind == "away"))
        told = reasons[0].text
        if len(steps) == 1:
            raise ValueError(
                f"{folder} can't be restored: {told}\nIt is the last one that there is. Begin anew"
                " in another --workdir, or bring the files back."
            )
        moved = from_writer(
            "moving a checkpoint aside", functools.partial(move_aside, workdir, folder)
        )
        print(f"{folder} is damaged: {told}\n  moved to {moved}; trying step {steps[-2]}")
        steps.pop()
    raise ValueError(f"{workdir} has no checkpoint")


def stays(folder: Path, why: Reason) -> Exception:
    """The end of a run whose checkpoint can't be restored, though nothing says that it is damaged.

    An error of one process is that of all."""
    if why.kind == "away":
        return Restart(f"{folder} can't be read now: {why.text}")
    if why.text.startswith(f"{folder} "):  # a Misfit, which says what to do
        return ValueError(why.text)
    way_out = "It was left where it is: once the cause is mended, the same command resumes."
    if why.kind == "unknown":
        way_out = (
            f"It was left where it is. `python -m bltjax inspect {folder.parent.parent}` tells"
            " whether it is whole; if not, move it elsewhere, and the same command resumes from the"
            " one before it."
        )
    return ValueError(f"{folder} can't be restored: {why.text}\n{way_out}")


def move_aside(workdir: Path, folder: Path) -> str:
    """Moves a checkpoint to `damaged/`; where it is now."""
    place = workdir / "damaged" / folder.name
    count = 1
    while place.exists():
        count += 1
        place = workdir / "damaged" / f"{folder.name}-{count}"
    place.parent.mkdir(exist_ok=True)
    folder.rename(place)
    return str(place)


def last_good(manager: ocp.CheckpointManager, workdir: Path, faults: FaultsConfig) -> str:
    """What is left of a run that bad batches ended, and what to do.

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
