"""One trainer for the byte LM, the byte CNN and BLT, read from top to bottom.

The loop dispatches step n and only then fetches the report of step n - 1, so the host never stalls
the device. A checkpoint holds the state, the data streams and the step together; running the same
command again resumes from the newest one, and its losses are those of a run never interrupted.
As many processes run it as there are hosts: each builds the rows of its devices, all compute every
step together, one writes reports.
"""

import argparse
import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from bltjax.config.arguments import path_argument
from bltjax.config.fields import divides, to_dict
from bltjax.config.load import load_config
from bltjax.config.model import BLTConfig, ByteCNNConfig, ByteLMConfig
from bltjax.config.run import RunConfig
from bltjax.data.pipeline import held_out_batches, training_batches, training_sources
from bltjax.distributed.agreement import check_agreement
from bltjax.distributed.coordinator import process_count
from bltjax.distributed.preemption import INTERRUPTED, TERMINATED, Notice
from bltjax.distributed.processes import (
    PATIENCE,
    Restart,
    barrier,
    from_writer,
    is_writer,
    join,
    leave,
    together,
)
from bltjax.distributed.processes import add_arguments as add_process_arguments
from bltjax.distributed.rows import global_batch, own_rows
from bltjax.distributed.sharding import row_sharding
from bltjax.distributed.watchdog import Watchdog
from bltjax.evaluation.scores import held_out_bits
from bltjax.inference.entropy import scored_source
from bltjax.model.build import parameter_count
from bltjax.model.flops import training_flops
from bltjax.progress import quantity
from bltjax.system.environment import check_numbers, random_key
from bltjax.system.lock import held
from bltjax.system.paths import path_of
from bltjax.training import resume
from bltjax.training.checkpoint import checksums, last_good, make_manager, save
from bltjax.training.goodput import Goodput
from bltjax.training.init import (
    check_copies,
    check_start,
    entropy_model,
    mesh_and_parts,
    placed_patches,
    started,
)
from bltjax.training.profiling import Profile
from bltjax.training.reports import Reporter, Reports
from bltjax.training.restore import restore_newest
from bltjax.training.resume import change_lines, check_sources
from bltjax.viz.page import write_page
from bltjax.weights import workdir as ckpt
from bltjax.weights.export import TOKENIZER

KINDS = {BLTConfig: "BLT", ByteLMConfig: "byte LM", ByteCNNConfig: "byte CNN"}


def train(
    config: RunConfig,
    workdir: epath.Path,
    *,
    stop_at: int | None = None,
    profiled: str = "",
    take_over: bool = False,
) -> dict:
    """Trains to `optimizer.steps` (or until `stop_at`), resuming what is there; the last report.

    profiled: START:STOP, the steps of which a trace is written. take_over: doesn't wait to see
    whether a run on another host still uses the work directory.

    Raises:
      ValueError: for a work directory of another run, or one in use; data that the config cannot
        use; processes that were told different things.
      FloatingPointError: at a step whose loss or gradient `config.faults` doesn't let pass.
      Restart: after SIGTERM, once the state is saved.
      KeyboardInterrupt: after SIGINT, once the state is saved; at once before the first step, and
        at a second one.
    """
    begun = time.monotonic()
    check_numbers("train")
    workdir = path_of(workdir)
    profile = Profile(profiled, workdir)
    settings = {"workdir": str(workdir), "stop_at": stop_at, "config": to_dict(config)}
    check_agreement(settings)
    with only_run(workdir, take_over) as check_lock:
        return train_alone(config, workdir, begun, profile, stop_at, check_lock)


@contextlib.contextmanager
def only_run(workdir: epath.Path, take_over: bool) -> Iterator[Callable[[], Any]]:
    """Locks a work directory, for all processes of a run; what looks whether it still is locked."""
    with contextlib.ExitStack() as exits:
        checks = []

        def lock() -> None:
            resume.check_place(workdir)  # a name that is refused leaves nothing behind
            holds = held(
                workdir / ".lock", "train", name=str(workdir), instead="another --workdir",
                lost=functools.partial(leave, 1), take_over=take_over,
            )  # fmt: skip
            checks.append(exits.enter_context(holds).check)

        from_writer("locking the work directory", lock)
        yield lambda: [check() for check in checks]


def train_alone(
    config: RunConfig,
    workdir: epath.Path,
    begun: float,
    profile: Profile,
    stop_at: int | None,
    check_lock: Callable[[], Any],
) -> dict:
    """`train`, in a work directory that no other run uses."""
    run = resume.check_workdir(workdir, config)
    resumes = run is not None
    check_start(config, workdir, resumes)
    byte_lm = entropy_model(config, workdir)
    notes = []  # of what a resumed run calls by another name
    if resumes:
        notes += from_writer(
            "comparing copies", lambda: check_copies(run, config, workdir, byte_lm)
        )
    mesh, parts = mesh_and_parts(config)
    if config.mesh.tensor == 1:
        divides("the number of processes", process_count(), "data.rows", config.data.rows)
    take_step, scores = together(parts.step), together(parts.scores)
    rows = row_sharding(mesh)
    patching = placed_patches(config, workdir)
    expected = byte_lm.identity if byte_lm else None

    streams = own_rows(rows, config.data.rows)
    sources = training_sources(config.data, expected)
    dataset = training_batches(
        config.data, patching, seed=config.seed, streams=streams, sources=sources
    )
    fingerprints = from_writer(
        "comparing sources", lambda: {name: found.fingerprint for name, found in sources.items()}
    )
    if resumes:
        saved = from_writer(
            "comparing sources", lambda: ckpt.newest_progress(workdir).get("sources", {})
        )
        notes += check_sources(run, config, workdir, saved, fingerprints)
    batches = iter(dataset)
    held_out = []
    for name, source in config.data.held_out.items():
        documents = scored_source(source, patching, byte_lm, skip_bad=config.data.skip_bad)
        found, found_cuts = held_out_batches(documents, config.data, patching)
        held_out += found
        if found_cuts:
            print(f"held-out {name}: {found_cuts} cuts in documents longer than a row")

    counts = parameter_count(parts.shapes.params, config.model)
    flops = training_flops(
        config.model, config.data.rows, config.data.row_bytes, config.data.row_patches
    )
    print(
        f"{KINDS[type(config.model)]}: {quantity(counts['total'])} parameters ("
        + ", ".join(f"{part} {quantity(n)}" for part, n in counts.items() if part != "total")
        + f"); {quantity(flops)}FLOP a step; mesh {dict(mesh.shape)}; {parts.config.compute_dtype}"
        + (f"; {process_count()} processes" if process_count() > 1 else "")
    )

    # The data is there and the settings hold: from here on the directory is this run's.
    if is_writer():
        ckpt.write_config(workdir, config)
    if is_writer() and not resumes:
        if byte_lm:
            ckpt.save_params(workdir / "byte_lm", byte_lm.run, byte_lm.params, 0)
        if config.blt and config.patching.mode == "bpe":
            epath.Path(config.patching.tokenizer).copy(workdir / TOKENIZER, overwrite=True)
    barrier("beginning the work directory")
    goodput = Goodput(workdir, begun)
    if not resumes:
        key = random_key(config.seed)
        initial_state = jax.jit(parts.initial_state, out_shardings=parts.shardings)
        state = together(initial_state)(key)
        state = state._replace(params=started(config, state.params, parts.shardings.params))
        first = 0
    else:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            parts.shapes,
            parts.shardings,
        )
        state, states, progress = restore_newest(workdir, target, streams)
        first = progress["step"]
        batches.set_state(states)
        print(f"resumed {workdir} after step {first}")
        for line in change_lines(run, config, first):
            print(f"  changed: {line}")
        for line in notes:
            print(f"  {line}")
    goodput.resume(first)
    manager = make_manager(workdir, config)
    reporter = Reporter(workdir, first)
    last_step = min(config.optimizer.steps, stop_at or config.optimizer.steps)
    reports = Reports(
        config, reporter, flops, last_step, lambda: last_good(manager, workdir, config.faults)
    )
    notice = Notice(mesh)
    watchdog = Watchdog(config.faults.hang_seconds)
    ending = 0  # the notice to end, if any process has been given one

    with contextlib.ExitStack() as exits:
        exits.callback(batches.close)
        exits.callback(reporter.close)
        exits.callback(profile.close)
        exits.push(lambda error, *_: close(manager, error))
        exits.enter_context(notice)
        exits.enter_context(watchdog)
        exits.enter_context(jax.set_mesh(mesh))  # by which kernels are split among devices
        # A transfer that nobody asked for would stall every step; it is an error here.
        exits.enter_context(jax.transfer_guard("disallow"))
        pending = None
        for step in profile.steps(range(first + 1, last_step + 1)):
            watchdog.mark(step, "waits for data")
            with goodput.during("input"):
                batch = global_batch(next(batches), rows, config.data.rows)
            if step == first + 1:
                watchdog.mark(step, "compiles", PATIENCE)
                with goodput.during("compile"):
                    state, out = take_step(state, batch)
                    jax.block_until_ready((out, checksums(state)))  # of a first checkpoint
                goodput.begin_steps()
                notice.catch(signal.SIGINT)  # before, there is nothing that it should save
            else:
                watchdog.mark(step, "computes")
                state, out = take_step(state, batch)
            profile.dispatched(out)
            out["notice"] = notice.asked()
            if pending is not None:
                ending = reports.take(*pending)
            pending = (step, out)
            ends = step == last_step
            # Whoever was given notice has little time, and saves at once.
            evaluates = bool(held_out) and (
                ends or (step % config.evaluate_every == 0 and not ending)
            )
            saves = ends or ending or step % config.checkpoint.every == 0
            if evaluates or saves:
                reports.take(*pending)  # nothing that is not finite may reach a checkpoint
                pending = None
            if evaluates:
                watchdog.mark(step, "evaluates", PATIENCE)
                with goodput.during("evaluation"), reports.paused():
                    bits = held_out_bits(scores, state.params, held_out, rows)
                reports.held_out(step, bits)
            if saves:
                watchdog.mark(step, "saves", PATIENCE)
                progress = {
                    "step": step,
                    "config": to_dict(config),
                    "sources": fingerprints,
                    "held_out_bits_per_byte": reports.values.get("held_out_bits_per_byte"),
                }
                check_lock()
                with goodput.during("checkpoints"):
                    save(manager, state, batches.get_state(), progress)
                goodput.save(step)
            manager.check_for_errors()
            if step % config.log_every == 0:
                goodput.write()
            if ending:
                break
        watchdog.mark(last_step, "ends", PATIENCE)
        with goodput.during("checkpoints"):
            manager.wait_until_finished()
        goodput.write(ended=ending != TERMINATED)
        reporter.write(last_step, {f"goodput/{kind}": s for kind, s in goodput.shares().items()})
    print(goodput.told())
    if ending == INTERRUPTED and step < last_step:
        raise KeyboardInterrupt(f"step {step} is saved; the same command resumes")
    if ending and step < last_step:
        raise Restart(f"SIGTERM: step {step} is saved, and the same command goes on from there")
    return reports.values


def close(manager, error: type[BaseException] | None) -> None:
    """Lets a checkpoint be written to its end; not after an error among many processes, since one
    that has ended would be waited for, nor for a person who has pressed Ctrl-C twice."""
    if error is None or (process_count() == 1 and error is not KeyboardInterrupt):
        manager.close()


def saved_so_far(workdir: epath.Path) -> str:
    """What an interrupted run has saved, and what the same command would do."""
    steps = ckpt.saved_steps(workdir)
    if steps:
        return f"step {steps[-1]} is the last one saved; the same command resumes from there"
    return "nothing is saved yet; the same command starts again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, help="configs/FILE.py or configs/FILE.py:ARGUMENT"
    )
    parser.add_argument("--workdir", required=True, type=path_argument, help="where the run lives")
    add_process_arguments(parser)
    parser.add_argument("--stop_at", type=int, help="stop after this step, as if interrupted")
    parser.add_argument(
        "--profile", default="", metavar="START:STOP", help="trace these steps, for xprof"
    )
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="begin at once where a run on another host, which is gone, used the work directory",
    )
    parser.add_argument("--init_from", help="run or export whose parameters training begins with")
    parser.add_argument(
        "--init_latent_from",
        help="folder of Llama 3 safetensors that the latent transformer begins as; see the"
        " settings of config.latent_init",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.init_from:
        overrides = [*overrides, f"init_from={args.init_from}"]
    if args.init_latent_from:
        overrides = [*overrides, f"latent_init.path={args.init_latent_from}"]
    join(args)
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
    if is_writer():
        print(f"page: {write_page(args.workdir)}")
    print(f"finished; the run is in {args.workdir}")
