"""A pod on one machine: N processes of M forced CPU devices each run one command together.

    python launch/local_pod.py --processes 4 --devices 2 -- train --config=... --workdir=...

It rehearses many processes: everything but the network is as on a pod. Each line of output is
prefixed with its process index. SIGTERM is forwarded to all (a terminal's Ctrl-C reaches all by
itself), and sent to all when the reader of the output closes it, as `head` does. When one process
fails the others are ended, as a scheduler would do. The exit code is the most serious one: an
error, else 75 (restart me, as for any process that was killed), else 0. `--restarts N` restarts all
up to N times while the code is 75.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESTART = 75  # bltjax.distributed.processes.RESTART; not imported, because this script needs no jax
ENDS_SECONDS = 15.0  # for processes that lost another one to log it, before they are killed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
    }


def start(count: int, devices: int, words: list[str]) -> list[subprocess.Popen]:
    """Starts the processes, with the options by which they find each other."""
    address = f"localhost:{free_port()}"
    joins = [f"--coordinator={address}", f"--processes={count}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "bltjax", *words, *joins, f"--process={index}"],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(count)
    ]


def say(line: bytes) -> None:
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The reader closed the output: all save and end. Their remaining output is read and
        # discarded, or they would block on it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGTERM)


def pass_lines(index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        say(f"[{index}] ".encode() + line)


def code_of(codes: list[int]) -> int:
    """The most serious exit code."""
    for code in codes:
        if code > 0 and code != RESTART:
            return code
    return RESTART if any(codes) else 0


def run(count: int, devices: int, words: list[str], signals: list[int]) -> int:
    """Starts all and waits for all; `signals` collects the signals that this script receives."""
    processes = start(count, devices, words)
    readers = [
        threading.Thread(target=pass_lines, args=pair, daemon=True) for pair in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    passed, failed_at = 0, None
    while any(process.poll() is None for process in processes):
        for number in signals[passed:]:
            passed += 1
            for process in processes:
                process.send_signal(number)  # nothing, to one that has ended
        if failed_at is None and any(process.poll() not in (None, 0) for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > ENDS_SECONDS:
            for index, process in enumerate(processes):
                if process.poll() is None:
                    say(f"[{index}] outlived another one, and is killed\n".encode())
                    process.kill()
            failed_at = time.monotonic()
        time.sleep(0.05)
    for reader in readers:
        reader.join()
    codes = [process.returncode for process in processes]
    if any(codes):
        say(f"processes ended with {', '.join(map(str, codes))}\n".encode())
    return code_of(codes)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--devices", type=int, default=1, metavar="M", help="of each process")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="after a code of 75")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- VERB ...")
    args = parser.parse_args(argv)
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words or args.processes < 1 or args.devices < 1 or args.restarts < 0:
        parser.error("give N >= 1 processes of M >= 1 devices, and after -- a verb of bltjax")
    signals: list[int] = []
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: signals.append(number)),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, _: None),
    }
    try:
        code = run(args.processes, args.devices, words, signals)
        for again in range(args.restarts):
            if code != RESTART or signals:
                break
            say(f"restart {again + 1} of at most {args.restarts}\n".encode())
            code = run(args.processes, args.devices, words, signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
