"""Restoring a checkpoint, by any number of processes; damaged ones are moved aside.

Only damage moves a checkpoint (weights/damage.py defines damage). Any other failure to restore it
ends the run, and it stays where it is.
"""

import contextlib
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bltjax.distributed.processes import Restart, allgather_json, broadcast_from_primary
from bltjax.training.checkpoint import (
    StreamsHandler,
    StreamsRestore,
    named_checksums,
    named_leaves,
    shapes_of,
)
from bltjax.training.step import TrainState
from bltjax.weights.damage import Misfit, Reason, read_progress, stored_name, why_not
from bltjax.weights.workdir import quiet, reader, saved_steps, stored_shapes


class Restored(NamedTuple):
    state: TrainState
    streams: dict[str, dict]
    progress: dict


def check_fits(folder: Path, progress: dict, target: TrainState) -> None:
    """Raises Misfit, naming an array, if `target` has other arrays than those saved."""
    asked = shapes_of(target)
    names = {stored_name(name) for name in progress["checksums"]}
    lines = [f"{name} is in {'it' if name in names else 'the run'} alone"
             for name in sorted(names ^ asked.keys())]  # fmt: skip
    if not lines:
        saved = progress.get("shapes", {})
        with contextlib.suppress(Exception):  # restoring names unreadable files
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
    """`shapes_of` a checkpoint whose progress lacks them, as older ones: from Orbax's index."""
    found = {}
    for item in ("params", "opt"):
        for name, leaf in named_leaves(stored_shapes(folder / item)).items():
            if leaf.dtype is not None:
                dtype, shape = np.dtype(leaf.dtype).name, tuple(leaf.shape)
                found[f"{item}/{stored_name(name)}"] = f"{dtype} {shape}"
    return found


def restore(folder: Path, target: TrainState, streams: list[int]) -> Restored:
    """A checkpoint on the shardings of `target` (arrays or shapes), with these streams' states.

    A process reads its devices' part, and waits for no other.

    Raises:
      Damaged: if a file of ours differs from what was saved.
      Misfit: if `target` has other arrays.
      Also anything that Orbax and the storage raise; see `reason`.
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
    return Restored(TrainState(step, params, opt), states, progress)


def changed_arrays(restored: Restored) -> str:
    """The arrays that differ from what was saved; empty if none. Every process calls this at
    once."""
    saved, found = (
        {stored_name(name): checksum for name, checksum in checksums.items()}
        for checksums in (restored.progress["checksums"], named_checksums(restored.state))
    )
    wrong = sorted({name for name, _ in saved.items() ^ found.items()})
    return f"{', '.join(wrong[:3])} is not what was saved" if wrong else ""


def restore_newest(workdir: Path, target: TrainState, streams: list[int]) -> Restored:
    """The newest checkpoint that every process can restore; damaged ones are moved aside.

    Raises:
      ValueError: naming the fault, if none is intact; or if one can't be restored for a reason
        that isn't damage, in any process.
      Restart: if the storage doesn't answer.
    """
    steps = broadcast_from_primary("looking for checkpoints", lambda: saved_steps(workdir))
    while steps:
        folder, restored, mine = workdir / "checkpoints" / str(steps[-1]), None, None
        try:
            restored = restore(folder, target, streams)
        except Exception as error:  # Orbax and its storage raise many kinds
            mine = why_not(folder, error)
        reasons = [Reason(*r) for r in allgather_json("restoring a checkpoint", mine) if r]
        if not reasons and (text := changed_arrays(restored)):  # of global arrays: alike everywhere
            reasons = [Reason("damaged", text)]
        if not reasons:
            return restored
        others = [each for each in reasons if each.kind != "damaged"]
        if others:
            raise stays(folder, min(others, key=lambda each: each.kind == "away"))
        reason = reasons[0].text
        if len(steps) == 1:
            raise ValueError(
                f"{folder} can't be restored: {reason}\nIt is the only one left. Start again"
                " in another --workdir, or restore the files."
            )
        moved = broadcast_from_primary(
            "moving a checkpoint aside", functools.partial(move_aside, workdir, folder)
        )
        print(f"{folder} is damaged: {reason}\n  moved to {moved}; trying step {steps[-2]}")
        steps.pop()
    raise ValueError(f"{workdir} has no checkpoint")


def stays(folder: Path, why: Reason) -> Exception:
    """The error for a checkpoint that can't be restored, with no sign of damage.

    An error of one process is raised in all.
    """
    if why.kind == "away":
        return Restart(f"{folder} can't be read now: {why.text}")
    if why.text.startswith(f"{folder} "):  # a Misfit, whose message has the way out
        return ValueError(why.text)
    way_out = "It was left where it is: once the cause is fixed, the same command resumes."
    if why.kind == "unknown":
        way_out = (
            f"It was left where it is. `python -m bltjax inspect {folder.parent.parent}` tells"
            " whether it is whole; if not, move it elsewhere, and the same command resumes from the"
            " one before it."
        )
    return ValueError(f"{folder} can't be restored: {why.text}\n{way_out}")


def move_aside(workdir: Path, folder: Path) -> str:
    """Moves a checkpoint to `damaged/`; returns its new path."""
    target = workdir / "damaged" / folder.name
    count = 1
    while target.exists():
        count += 1
        target = workdir / "damaged" / f"{folder.name}-{count}"
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    return str(target)
