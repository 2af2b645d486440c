"""Processes that want one lock at once, and are killed anywhere while they take it.

    python tests/lock_trials.py FOLDER --kind=contend --times=500     # two, in a loop
    python tests/lock_trials.py FOLDER --kind=crash --times=40        # four, for one stale lock

Whoever holds the lock creates a file that must not exist, and removes it: so two holders at once
are counted. It imports no jax, so that a process costs a fork. Prints JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bltjax.system import lock, owner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DONE, TWO_AT_ONCE, KILLED = 0, 3, 9
make, remove = os.open, os.unlink


def take(path: Path) -> owner.Holder:
    """Takes the lock, retrying while others hold it."""
    while True:
        holder = owner.this_process("trial")
        try:
            lock.take(path, holder)
            return holder
        except lock.InUse:
            time.sleep(0.0005)


def alone(folder: Path) -> bool:
    """Whether no other process holds the lock."""
    try:
        os.close(make(folder / "witness", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    remove(folder / "witness")
    return True


def in_child(body: Callable[[], int]) -> int:
    """Runs it in a forked child; returns the child's process number."""
    child = os.fork()
    if child:
        return child
    try:
        os._exit(body())
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def codes(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def contend(folder: Path, times: int) -> int:
    """Takes and drops the lock `times` times."""
    for _ in range(times):
        holder = take(folder / ".lock")
        if not alone(folder):
            return TWO_AT_ONCE
        lock.drop(folder / ".lock", holder)
    return DONE


def killed_anywhere(choose: random.Random, chance: float) -> None:
    """From now on this process may die before or after any call that changes a name."""

    def fatal(call: Callable) -> Callable:
        def called(*arguments, **options):
            if choose.random() < chance:
                os._exit(KILLED)
            found = call(*arguments, **options)
            if choose.random() < chance:
                os._exit(KILLED)
            return found

        return called

    os.link, os.replace, os.unlink = fatal(os.link), fatal(os.replace), fatal(os.unlink)


def crash(folder: Path, seed: str, chance: float) -> int:
    """Takes the lock once, unless killed; then drops it or leaves it."""
    choose = random.Random(seed)
    killed_anywhere(choose, chance)
    holder = take(folder / ".lock")
    if not alone(folder):
        return TWO_AT_ONCE
    if choose.random() < 0.5:
        lock.drop(folder / ".lock", holder)
    return DONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("contend", "crash"), required=True)
    parser.add_argument("--times", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.alarm(600)  # whoever would wait for ever
    if args.kind == "contend":
        ended = codes([in_child(lambda: contend(args.folder, args.times)) for _ in range(2)])
        print(json.dumps({"ended": ended}))
        return
    ended = []
    for turn in range(args.times):
        codes([in_child(lambda: (take(args.folder / ".lock"), KILLED)[1])])
        ended += codes(
            [
                in_child(lambda number=number, turn=turn: crash(
                    args.folder, f"{args.seed} {turn} {number}", 0.04
                ))
                for number in range(4)
            ]
        )  # fmt: skip
    started_at = time.monotonic()
    holder = take(args.folder / ".lock")
    lock.drop(args.folder / ".lock", holder)
    counts = {str(code): ended.count(code) for code in set(ended)}
    print(json.dumps({"codes": counts, "last": time.monotonic() - started_at}))


if __name__ == "__main__":
    main()
