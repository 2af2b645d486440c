"""A run resumed with other settings: which changes are refused, and log lines for the rest.

Each field of a config has a rule (config/fields.py). Most settings may not change; those that only
affect how a run is executed may. Paths of a run's inputs may change if the contents are the same:
fingerprints of sources are compared, and for a byte LM and a tokenizer the run's own copies. And a
run may become longer, on the schedule of the new config.
"""

from pathlib import Path

from bltjax.config.fields import (
    FIXED,
    LENGTH,
    MAY_CHANGE,
    RENAMED,
    SAME_CONTENT,
    Change,
    changes,
    to_dict,
)
from bltjax.config.run import OptimizerConfig, RunConfig
from bltjax.configured import from_json
from bltjax.distributed.coordinator import process_index
from bltjax.distributed.processes import allgather_json, broadcast_from_primary, is_primary
from bltjax.system.paths import check_arrays_path, check_unused
from bltjax.system.storage import check_writable
from bltjax.training.optimizer import learning_rate
from bltjax.weights.workdir import CONFIG, config_values, newest_progress, saved_steps


def check_settings(run: RunConfig, config: RunConfig, workdir, step: int) -> None:
    """Checks, by the settings alone, whether `config` may resume the run.

    run: its previous config. step: of its newest checkpoint.

    Raises:
      ValueError: with the settings that may not change, and the ways out.
    """
    found = changes(run, config)
    lines = [problem for change in found if (problem := refusal(change, step))]
    if lines:
        raise ValueError(
            f"{workdir} holds a run with another config (its value -> yours):\n  "
            + "\n  ".join(lines)
            + f"\nGive the same settings to resume it, or {way_out(run, config, workdir)}."
        )


def refusal(change: Change, step: int) -> str:
    """The reason why a change is refused; empty if the settings alone don't decide."""
    if change.rule == LENGTH and change.new < step:
        return f"{change}, but step {step} is done: give at least {step}"
    if change.rule == RENAMED and not (change.old and change.new):
        return str(change)
    return str(change) if change.rule == FIXED else ""


def way_out(run: RunConfig, config: RunConfig, workdir) -> str:
    """How to start a new run instead, with this one's weights if they fit."""
    begin = "start a new run in another --workdir"
    if any(change.rule != MAY_CHANGE for change in changes(run.model, config.model)):
        return begin
    return (
        f"{begin}; with --init_from={workdir} it has this one's weights, but neither the"
        " optimizer's moments nor the position in the data"
    )


def setting_changes(run: RunConfig, config: RunConfig, step: int) -> list[str]:
    """A line for the log per changed setting, when a run is resumed after `step`."""
    lines = []
    for change in changes(run, config):
        rates = rates_after(step, run.optimizer, config.optimizer) if change.rule == LENGTH else ""
        lines.append(f"{change}{rates and ': '}{rates}")
    return lines


def rates_after(step: int, old: OptimizerConfig, new: OptimizerConfig) -> str:
    """The learning rates of the update after `step`, on both schedules."""
    before, after = (float(learning_rate(config)(step)) for config in (old, new))
    return (
        f"the learning rate after step {step} is {after:.4g} on the new schedule (cosine to step"
        f" {new.steps}), was {before:.4g} on the old one"
    )


def check_sources(
    run: RunConfig, config: RunConfig, workdir, saved: dict[str, str], found: dict[str, str]
) -> list[str]:
    """Checks that sources have the same contents; returns lines for the log where a path changed.

    saved, found: fingerprints by source, those of the checkpoint and of the documents. Checkpoints
    of older versions have none: for these only the numbers of records are compared, when the
    streams are restored.

    Raises:
      ValueError: naming the source whose contents differ.
    """
    lines = []
    for name, source in config.data.train.items():
        renamed = changes(run.data.train[name], source, f"data.train.{name}", SAME_CONTENT)
        if name in saved and saved[name] != found[name]:
            names = "".join(f"\n  {change}" for change in renamed)
            raise ValueError(
                f"source {name!r} ({source.path}) doesn't hold the documents that it had when this"
                f" run was saved, or not in the same order: {workdir} can't be resumed with"
                f" it.{names}\nBring them back, or {way_out(run, config, workdir)}."
            )
        if renamed:
            where = f"source {name!r} has another name"
            lines.append(
                f"{where}, and the same documents"
                if name in saved
                else f"{where}; its content was not compared, since the checkpoint is of a version"
                " that kept no fingerprints. It has as many records as before"
            )
    return lines


def check_workdir(workdir: Path, config: RunConfig) -> RunConfig | None:
    """Creates the directory, or checks that `config` may resume the run in it.

    A run that never wrote a checkpoint has nothing to lose, so its directory may be reused.
    Returns the config of the run to resume, None if there is none. Every process calls this.

    Raises:
      ValueError: with the settings that differ, if the directory belongs to another config; or if
        the processes don't share it.
      OSError: if it cannot be written.
    """
    mark = workdir / "checkpoints" / ".writable"
    run = broadcast_from_primary(
        "checking the work directory", lambda: begin_workdir(workdir, config, mark)
    )
    problem = ""
    try:
        if not mark.exists():
            problem = f"{workdir} is not the folder that process 0 sees: all must share one"
        own = mark.with_name(f".writable-{process_index()}")
        own.write_text("", encoding="utf-8")
        own.unlink()
    except OSError as error:
        problem = str(error)
    problems = allgather_json("checking the work directory", problem)
    if is_primary():
        mark.unlink()
    for index, problem in enumerate(problems):
        if problem:
            raise ValueError(f"process {index}: {problem}")
    return run and from_json(run, workdir / CONFIG)


def check_place(workdir: Path) -> None:
    """Raises ValueError if a folder can't hold a run, because of its name or its contents."""
    check_arrays_path(workdir)
    check_unused(workdir, by="a run")


def begin_workdir(workdir: Path, config: RunConfig, mark: Path) -> dict | None:
    """Creates the directory and `mark` in it; returns the config of an existing run, as JSON."""
    check_writable(mark.parent)  # fail now, not at the first checkpoint
    found = None
    if steps := saved_steps(workdir):
        run = from_json(config_or_saved_one(workdir), workdir / CONFIG)
        check_settings(run, config, workdir, steps[-1])
        found = to_dict(run)
    mark.write_text("", encoding="utf-8")  # last: a refused config leaves nothing behind
    return found


def config_or_saved_one(workdir: Path) -> dict:
    """A run's config as JSON, from config.json or, if that is damaged, from the newest
    checkpoint."""
    try:
        return config_values(workdir)
    except ValueError as error:
        progress = newest_progress(workdir)
        if "config" not in progress:
            raise
        reason = str(error).splitlines()[0].removesuffix(".")
        print(f"{reason}; the settings are those in the checkpoint of step {progress['step']}")
        return progress["config"]
