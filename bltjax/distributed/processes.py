"""Many processes as one job: how they connect, agree, and exit.

`initialize` is called before jax touches a device. On Cloud TPU, GKE and SLURM jax itself knows the
coordinator, the number of processes and this process's index; elsewhere three options give them.
From then on only process 0 prints and writes (`is_primary`); the output of the others is dropped,
except for errors. Processes exchange small JSON values through the coordinator's key-value store,
which works while no device does.

A program exits with one of these codes, and the scripts in launch/ act on them:

    0     finished
    1     an error that a restart would meet again: a setting, data, a loss that is not finite
    75    RESTART: the same command resumes the run (preemption, a lost process)
    130   CTRL_C: a person's Ctrl-C; nothing restarts it automatically
"""

import argparse
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from bltjax.distributed import coordinator
from bltjax.distributed.coordinator import joined, process_count, process_index
from bltjax.distributed.messages import OWN_FAULTS, disk_is_full, says
from bltjax.system.compiling import forget_programs

RESTART = 75  # EX_TEMPFAIL of sysexits.h
CTRL_C = 130  # as a shell has it: ended by SIGINT
JOIN_SECONDS = 300
AGREE_SECONDS = 1200  # hosts read their data at different speeds
PATIENCE = 3600  # seconds, for work that may take long without being a hang: compiling, evaluating
calls = itertools.count()  # every process makes the same calls, so a counter names each


class Restart(Exception):
    """Ends a program with the exit code RESTART; its message is the reason."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes and --process, for programs that run as many processes."""
    group = parser.add_argument_group(
        "many processes",
        "found automatically on Cloud TPU, GKE and SLURM; elsewhere give all three",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this one: 0 ... N - 1")
    group.add_argument(
        "--join_seconds",
        type=int,
        default=JOIN_SECONDS,
        help=f"how long to wait for the others (default: {JOIN_SECONDS})",
    )


def initialize(args: argparse.Namespace) -> None:
    """Connects this process to the others, if the options or the cluster name any.

    Raises:
      ValueError: for options that don't fit together.
      Restart: if the coordinator, or another process, doesn't answer in time.
    """
    if joined():
        return
    given = [args.coordinator, args.processes, args.process]
    # Collectives of CPU devices in several processes; other devices have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax would catch SIGTERM in every program, also in those that have nothing to save.
    jax.config.update("jax_enable_preemption_service", False)
    if given == [None, 1, None]:
        return
    if given.count(None) == 3:
        join_cluster(args.join_seconds)
    elif None in given:
        raise ValueError(
            "--coordinator, --processes and --process belong together; given are"
            f" {args.coordinator}, {args.processes} and {args.process}"
        )
    else:
        join_at(args.coordinator, args.processes, args.process, args.join_seconds)
    if process_count() > 1:
        forget_programs()
    if not is_primary():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


def process_index_and_count(args: argparse.Namespace) -> tuple[int, int]:
    """Index of this process and number of processes, without connecting to the others.

    For work that is divided and not shared: a lost or late process delays no other.

    Raises:
      ValueError: for --process without --processes, or out of range.
    """
    index, count = args.process, args.processes
    if index is None and count is None:
        return coordinator.place_in_cluster() or (0, 1)
    if index is None or count is None or not 0 <= index < count:
        raise ValueError(f"--process ({index}) must be 0 ... --processes - 1, of {count}")
    return index, count


def join_cluster(seconds: int) -> None:
    if coordinator.devices_started():
        return  # called from a program that has already started devices, such as a notebook: alone
    try:
        jax.distributed.initialize(initialization_timeout=seconds)
    except ValueError as error:
        # jax knows no cluster here: this is the only process.
        if not says(error, "no cluster"):
            raise
    except (OSError, RuntimeError) as error:
        # Continuing alone would let every host of a pod train by itself.
        raise ValueError(
            f"looking for the other processes of a cluster failed: {error}\nIf this is the only"
            " one, give --processes=1."
        ) from error


def join_at(address: str, count: int, index: int, seconds: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator is {address!r}, not HOST:PORT")
    if not 0 <= index < count:
        raise ValueError(f"--process ({index}) must be 0 ... --processes - 1 = {count - 1}")
    deadline = time.monotonic() + seconds
    if index:
        wait_for_listener(host.strip("[]"), int(port), address, index, seconds)
    # A timeout inside jax aborts the process with a stack trace. Ours comes first.
    late = threading.Timer(
        max(1.0, deadline - time.monotonic()),
        lambda: exit_now(
            RESTART,
            f"process {index} waited {seconds} s at the coordinator {address}, but not all of"
            f" {count} processes came. Check that each was started, with this address and"
            f" --processes={count}.",
        ),
    )
    late.daemon = True
    late.start()
    jax.distributed.initialize(
        address,
        count,
        index,
        initialization_timeout=seconds + 60,
        cluster_detection_method="deactivate",
    )
    late.cancel()


def wait_for_listener(host: str, port: int, address: str, index: int, seconds: int) -> None:
    """Returns once something listens at the coordinator's address."""
    deadline, reason = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise Restart(
        f"process {index} could not reach the coordinator at {address} in {seconds} s ({reason})."
        " Is that the address of process 0, and does process 0 run?"
    )


def is_primary() -> bool:
    """Whether this process prints, and writes logs and configs."""
    return process_index() == 0


def lost_another(error: Exception) -> bool:
    """Whether an error was most likely caused by the end of another process; a restart helps."""
    if not joined():
        return False
    if isinstance(error, TimeoutError):  # of one of Orbax's barriers, if jax is the cause
        error = error.__cause__
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not says(error, *OWN_FAULTS)
    # Some of jax's calls report a broken collective by a ValueError.
    return isinstance(error, ValueError) and says(error, "broken collective") is not None


def describe(error: Exception) -> str:
    """An error's message, with the file's name for an OSError."""
    if disk_is_full(error):
        return "the disk is full. Earlier saves are intact: make room, then run the same command"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror.lower()}"
    # One word, as in a KeyError, is no message.
    return str(error) if " " in str(error) else f"{type(error).__name__}: {error}".rstrip(": ")


def exit_now(code: int, message: str = "") -> NoReturn:
    """Exits this process at once; an ordinary exit of jax would wait for the other processes."""
    if message:
        print(f"bltjax: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_primary() and joined():
        time.sleep(1)  # without their coordinator the others abort, before they log why
    os._exit(code)


def allgather_json(what: str, value: Any, seconds: int = AGREE_SECONDS) -> list:
    """The value of every process, by process index; `what` names it in the error on a timeout.

    value: small, and JSON.
    seconds: how long the first may wait for the last.

    Raises:
      Restart: on a timeout, naming the missing processes.
    """
    if not joined():
        return [value]
    count, folder = process_count(), f"bltjax/{next(calls)}/"
    coordinator.put(f"{folder}{process_index()}", json.dumps(value))
    try:
        coordinator.wait_for_all(f"{folder}whole", seconds)
    except jax.errors.JaxRuntimeError as error:
        lost = sorted(set(range(count)) - coordinator.values_by_process(folder).keys())
        raise Restart(
            f"{what}: no answer from process {', '.join(map(str, lost))} in {seconds} s"
            if lost
            else f"{what}: {error}"
        ) from error
    found = coordinator.values_by_process(folder)
    coordinator.wait_for_all(f"{folder}read", AGREE_SECONDS)  # process 0 may end after this
    return [json.loads(found[index]) for index in range(count)]


def barrier(what: str, seconds: int = AGREE_SECONDS) -> None:
    """Returns once every process has called it."""
    allgather_json(what, None, seconds)


def compile_in_lockstep(jitted: Callable) -> Callable:
    """A jitted function that no process calls before all have compiled it.

    Processes may compile for minutes and finish far apart, but gloo allows 30 s for all of them to
    reach the first collective of a group of devices. Every process calls it with the same shapes
    in the same order; each set of shapes, and each mesh, has a program of its own.
    """
    programs = {}

    def mesh_of(leaf):  # None of NumPy's arrays, which are on no device
        return getattr(getattr(leaf, "sharding", None), "mesh", None)

    def call(*arguments):
        if not joined():
            return jitted(*arguments)
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, *((leaf.shape, leaf.dtype, mesh_of(leaf)) for leaf in leaves)
        if key not in programs:
            programs[key] = jitted.lower(*arguments).compile()
            barrier("compiling", PATIENCE)
        return programs[key](*arguments)

    return call


def broadcast_from_primary(what: str, make: Callable[[], Any]) -> Any:
    """The value that process 0 makes, in every process; its ValueError or OSError is raised in
    all."""
    made, problem = None, ""
    if is_primary():
        try:
            made = make()
        except (ValueError, OSError) as error:
            problem, raised = str(error) or type(error).__name__, error
    made, problem = allgather_json(what, [made, problem])[0]
    if problem:
        raise raised if is_primary() else ValueError(problem)
    return made
