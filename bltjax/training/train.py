"""One trainer for the byte LM, the byte CNN and BLT, to be read from top to bottom.

The loop dispatches step n and only then fetches the report of step n - 1, so the host never stalls
the device. A checkpoint holds the state, the data streams and the step together. Running the same
command again resumes from the newest one, with the losses of an uninterrupted run. There is one
process per host: each builds the rows of its devices, all compute every step together, one writes
reports.
"""

import argparse
import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable

import jax
from etils import epath

from bltjax.config.arguments import path_argument
from bltjax.config.fields import to_dict
from bltjax.config.run import RunConfig
from bltjax.configured import load_config
from bltjax.distributed.agreement import check_agreement
from bltjax.distributed.coordinator import process_count
from bltjax.distributed.preemption import INTERRUPTED, TERMINATED, Notice
from bltjax.distributed.processes import (
    PATIENCE,
    Restart,
    broadcast_from_primary,
    compile_in_lockstep,
    exit_now,
    initialize,
    is_primary,
)
from bltjax.distributed.processes import add_arguments as add_process_arguments
from bltjax.distributed.rows import make_global_batch
from bltjax.distributed.watchdog import Watchdog
from bltjax.evaluation.scores import held_out_sums
from bltjax.system.environment import check_numbers
from bltjax.system.lock import held
from bltjax.system.paths import path_of
from bltjax.training import resume
from bltjax.training.checkpoint import checksums, last_good, make_manager, save
from bltjax.training.goodput import Goodput, Profile
from bltjax.training.reports import Reporter, Reports
from bltjax.training.setup import Setup, claim, first_state, run_summary, set_up
from bltjax.viz.page import write_page
from bltjax.weights import workdir as ckpt


def train(
    config: RunConfig,
    workdir: epath.Path,
    *,
    stop_at: int | None = None,
    profiled: str = "",
    take_over: bool = False,
    watch: Callable[[int, dict], None] | None = None,
) -> dict:
    """Trains to `optimizer.steps` (or until `stop_at`), resuming an existing run; returns the last
    report.

    profiled: START:STOP, the steps to trace. take_over: don't wait to see whether a run on another
    host still uses the work directory. watch: is called with each report's step and values, instead
    of printing a line.

    Raises:
      ValueError: for a work directory of another run, or one in use; data that the config cannot
        use; processes with different settings.
      FloatingPointError: at a step whose loss or gradient `config.faults` doesn't tolerate.
      Restart: after SIGTERM, once the state is saved.
      KeyboardInterrupt: after SIGINT, once the state is saved; at once before the first step, and
        at a second one.
    """
    started_at = time.monotonic()
    check_numbers("train")
    workdir = path_of(workdir)
    profile = Profile(profiled, workdir)
    check_agreement({"workdir": str(workdir), "stop_at": stop_at, "config": to_dict(config)})
    with contextlib.ExitStack() as exits:
        check_lock = locked(exits, workdir, take_over)
        setup = set_up(config, workdir)
        config = setup.config
        print(run_summary(setup))
        claim(setup)  # the data is there and the settings hold
        goodput = Goodput(workdir, started_at)
        state, first = first_state(setup)
        goodput.resume(first)
        take_step = compile_in_lockstep(setup.parts.step)
        scores = compile_in_lockstep(setup.parts.scores)
        manager, reporter = make_manager(workdir, config), Reporter(workdir, first)
        last_step = min(config.optimizer.steps, stop_at or config.optimizer.steps)
        reports = Reports(
            config, reporter, setup.flops, last_step,
            lambda: last_good(manager, workdir, config.faults), watch,
        )  # fmt: skip
        # Whoever watches sees a hang, and may not want to lose the process by it.
        hang_seconds = config.faults.hang_seconds if watch is None else math.inf
        notice, watchdog = Notice(setup.mesh), Watchdog(hang_seconds)

        @contextlib.contextmanager
        def phase(step: int, doing: str, kind: str, seconds: float | None = None):
            """A phase of the loop: watched by the watchdog, traced, and charged to its kind of
            time. seconds: its limit, if other than a step's."""
            watchdog.mark(step, doing, seconds)
            with goodput.during(kind):
                yield

        exits.callback(setup.batches.close)
        exits.callback(reporter.close)
        exits.callback(profile.close)
        exits.push(lambda error, *_: close(manager, error))
        exits.enter_context(notice)
        exits.enter_context(watchdog)
        exits.enter_context(jax.set_mesh(setup.mesh))  # kernels are split among devices by it
        # An implicit transfer would stall every step; it is an error here.
        exits.enter_context(jax.transfer_guard("disallow"))
        pending = None
        ending = 0  # the signal, if any process has received one
        for step in profile.steps(range(first + 1, last_step + 1)):
            with phase(step, "waits for data", "input"):
                batch = make_global_batch(
                    next(setup.batches), setup.sharding, config.data.batch_size
                )
            if step == first + 1:
                with phase(step, "compiles", "compile", PATIENCE):
                    state, out = take_step(state, batch)
                    jax.block_until_ready((out, checksums(state)))  # of a first checkpoint
                goodput.begin_steps()
                notice.catch(signal.SIGINT)  # earlier there is nothing to save
            else:
                watchdog.mark(step, "computes")
                state, out = take_step(state, batch)
            profile.dispatched(out)
            out["notice"] = notice.asked()
            if pending is not None:
                ending = reports.take(*pending)
            pending = (step, out)
            ends = step == last_step
            # After a signal there is little time: save at once.
            due = ends or (step % config.evaluate_every == 0 and not ending)
            evaluates = bool(setup.held_out) and due
            saves = ends or ending or step % config.checkpoint.every == 0
            if evaluates or saves:
                reports.take(*pending)  # a checkpoint must hold finite numbers only
                pending = None
            if evaluates:
                with phase(step, "evaluates", "evaluation", PATIENCE), reports.paused():
                    sums = held_out_sums(scores, state.params, setup.held_out, setup.sharding)
                reports.held_out(step, sums)
            if saves:
                with phase(step, "saves", "checkpoints", PATIENCE):
                    check_lock()
                    progress = progress_of(setup, step, reports)
                    save(manager, state, setup.batches.get_state(), progress)
                goodput.save(step)
            manager.check_for_errors()
            if step % config.log_every == 0:
                goodput.write()
            if ending:
                break
        with phase(last_step, "ends", "checkpoints", PATIENCE):
            manager.wait_until_finished()
        goodput.write(ended=ending != TERMINATED)
        reporter.write(last_step, {f"goodput/{kind}": s for kind, s in goodput.shares().items()})
    print(goodput.summary())
    if ending == INTERRUPTED and step < last_step:
        raise KeyboardInterrupt(f"step {step} is saved; the same command resumes")
    if ending and step < last_step:
        raise Restart(f"SIGTERM: step {step} is saved, and the same command resumes")
    return reports.values


def locked(exits: contextlib.ExitStack, workdir: epath.Path, take_over: bool) -> Callable:
    """Locks a work directory until `exits` end, for all processes of a run; returns a check that it
    is still locked."""
    checks = []

    def lock() -> None:
        resume.check_place(workdir)  # a refused name leaves nothing behind
        holds = held(
            workdir / ".lock", "train", name=str(workdir), instead="another --workdir",
            lost=functools.partial(exit_now, 1), take_over=take_over,
        )  # fmt: skip
        checks.append(exits.enter_context(holds).check)

    broadcast_from_primary("locking the work directory", lock)
    return lambda: [check() for check in checks]


def progress_of(setup: Setup, step: int, reports: Reports) -> dict:
    """A checkpoint's progress: all about the run but its arrays."""
    held_out = f"held_out_{reports.measure.key}"
    return {
        "step": step,
        "config": to_dict(setup.config),
        "sources": setup.fingerprints,
        held_out: reports.values.get(held_out),
    }


def close(manager, error: type[BaseException] | None) -> None:
    """Waits for a checkpoint to be written; not after an error among many processes, because it
    would wait for one that has ended, nor after a second Ctrl-C."""
    if error is None or (process_count() == 1 and error is not KeyboardInterrupt):
        manager.close()


def saved_so_far(workdir: epath.Path) -> str:
    """The message for an interrupted run: what it has saved, and what the same command would do."""
    steps = ckpt.saved_steps(workdir)
    if steps:
        return f"step {steps[-1]} is the last one saved; the same command resumes from there"
    return "nothing is saved yet; the same command starts again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, help="configs/FILE.py or configs/FILE.py:ARGUMENT"
    )
    parser.add_argument("--workdir", required=True, type=path_argument, help="the run's folder")
    add_process_arguments(parser)
    parser.add_argument("--stop_at", type=int, help="stop after this step, as if interrupted")
    parser.add_argument(
        "--profile", default="", metavar="START:STOP", help="trace these steps, for xprof"
    )
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="don't wait for a run on another host that had the work directory and is gone",
    )
    parser.add_argument("--init_from", help="run or export to initialise the parameters from")
    parser.add_argument(
        "--init_latent_from",
        help="folder of Llama 3 safetensors to initialise the latent transformer from; see the"
        " settings of config.latent_init",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.init_from:
        overrides = [*overrides, f"init_from={args.init_from}"]
    if args.init_latent_from:
        overrides = [*overrides, f"latent_init.path={args.init_latent_from}"]
    initialize(args)
    config = load_config(args.config, overrides)
    try:
        train(
            config,
            args.workdir,
            stop_at=args.stop_at,
            profiled=args.profile,
            take_over=args.take_over,
        )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or saved_so_far(args.workdir)) from None
    if is_primary():
        print(f"page: {write_page(args.workdir)}")
    print(f"finished; the run is in {args.workdir}")
