"""Faults, injected into real runs of several processes at random moments.

    python tests/faults.py --times 20 --seed 0            # all kinds
    python tests/faults.py --kinds kill_all sigterm       # some

Each trial starts tests/tiny.py's byte LM on records as a pod on this machine, injects a fault,
restarts it with the same command until it has finished, and compares it with a run without faults:
every step's loss and the last state of every stream, bit for bit. So a trial also shows that no
record was skipped or read twice.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bltjax.data import records

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 24, 5
PROCESSES = 2


class Pod:
    """A run of launch/local_pod.py, and its output."""

    def __init__(self, work: "Work", workdir: Path, more: Sequence[str] = ()):
        words = [
            sys.executable, "launch/local_pod.py", f"--processes={PROCESSES}",
            "--", "train", "--config=tests/tiny.py:byte_lm", *more,
            f"--workdir={workdir}", f"--config.data.train.text.path={work.records}",
            f"--config.data.eval.text.path={work.root / 'held_out.jsonl'}",
            f"--config.optimizer.steps={STEPS}", f"--config.checkpoint.every={EVERY}",
        ]  # fmt: skip
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(work.root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(
                map(str, (ROOT / "tests/one_compiler", ROOT, ROOT / "tests"))
            ),
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.steps = threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            with self.steps:
                self.lines.append(line.rstrip())
                self.steps.notify_all()

    def reaches(self, step: int) -> None:
        """Returns when the step's report has been printed, or all has ended."""
        with self.steps:
            while self.process.poll() is None:
                if any(f" step {step}/" in line for line in self.lines[-40:]):
                    return
                self.steps.wait(0.1)

    def members(self) -> list[int]:
        """Process numbers of those that still run."""
        number = self.process.pid
        try:
            text = Path(f"/proc/{number}/task/{number}/children").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return list(map(int, text.split()))

    def ends(self) -> int:
        code = self.process.wait()
        self.reader.join()
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Work:
    """The data of all trials, and the run without faults."""

    def __init__(self, root: Path):
        self.root, self.records = root, root / "records"
        if not (root / "straight" / "done").exists():
            self.make()
        self.expected = traces(root / "straight")

    def make(self) -> None:
        sys.path.insert(0, str(ROOT))
        import numpy as np

        choose = random.Random(0)
        words = "the patch begins where the next byte is hard to guess".split()
        texts = [
            " ".join(choose.choices(words, k=choose.randint(2, 30))).encode() for _ in range(90)
        ]
        self.records.mkdir(parents=True, exist_ok=True)
        infos = []
        for shard in range(3):
            path = self.records / f"shard-{shard:05d}-of-00003.array_record"
            mine = texts[30 * shard : 30 * shard + 30]
            records.write_shard(
                path,
                (records.encode_record(t, np.zeros(len(t) + 1, np.float32)) for t in mine),
            )
            infos.append(records.shard_info(path, sum(map(len, mine)), len(mine), 0))
        manifest = records.Manifest("none", "", 0, "float32", "", tuple(infos))
        records.write_manifest(self.records, manifest)
        (self.root / "held_out.jsonl").write_text('{"text": "the next patch"}\n')
        shutil.rmtree(self.root / "straight", ignore_errors=True)
        pod = Pod(self, self.root / "straight")
        if pod.ends():
            raise RuntimeError(pod.text)
        (self.root / "straight" / "done").write_text("")


def traces(workdir: Path) -> dict:
    """The values to compare: losses by step, and the streams at the end."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    streams = (workdir / "checkpoints" / str(STEPS) / "streams").glob("*.json")
    return {
        "losses": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "streams": {path.name: json.loads(path.read_text()) for path in streams},
    }


def can_mount() -> bool:
    """Whether a small disk can be mounted on a folder: as root, usually."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def kill_one(work: Work, workdir: Path, choose: random.Random) -> str:
    pod = Pod(work, workdir)
    step = choose.randint(1, STEPS - 1)
    pod.reaches(step)
    time.sleep(choose.random() * 0.2)
    members = pod.members()
    victim = choose.randrange(len(members)) if members else None
    if victim is not None:
        os.kill(members[victim], signal.SIGKILL)
    code = pod.ends()
    assert code in (0, 75), (code, pod.text)
    return f"process {victim} killed after step {step}, code {code}"


def kill_all(work: Work, workdir: Path, choose: random.Random) -> str:
    pod = Pod(work, workdir)
    step = choose.randint(1, STEPS - 1)
    pod.reaches(step)
    time.sleep(choose.random() * 0.2)
    end_all(pod)
    return f"killed after step {step}"


def end_all(pod: Pod) -> None:
    for member in pod.members():
        os.kill(member, signal.SIGKILL)
    pod.ends()


def sigterm(work: Work, workdir: Path, choose: random.Random) -> str:
    pod = Pod(work, workdir)
    step = choose.randint(1, STEPS - 3)
    pod.reaches(step)
    pod.process.send_signal(signal.SIGTERM)
    started_at = time.monotonic()
    code = pod.ends()
    assert code in (0, 75), (code, pod.text)
    if code == 75:
        assert "SIGTERM: step" in pod.text, pod.text
    return f"SIGTERM after step {step}, code {code} after {time.monotonic() - started_at:.1f} s"


def kill_in_checkpoint(work: Work, workdir: Path, choose: random.Random) -> str:
    pod = Pod(work, workdir)
    # A later one, so that there is one before it; or the first, so that there is none.
    wanted = choose.choice(range(EVERY, STEPS, EVERY))
    while pod.process.poll() is None:
        if list((workdir / "checkpoints").glob(f"{wanted}.*tmp*")):
            time.sleep(choose.random() * 0.05)
            end_all(pod)
            break
        time.sleep(0.001)
    assert pod.ends() != 0 and f" step {wanted}/" in pod.text, pod.text  # it came that far
    left = [path.name for path in (workdir / "checkpoints").iterdir()]
    return f"killed while {wanted} was written; there were {', '.join(sorted(left))}"


def disk_full(work: Work, workdir: Path, choose: random.Random) -> str:
    """A small disk under the checkpoints; then a larger one."""
    one = sum(p.stat().st_size for p in (work.root / f"straight/checkpoints/{STEPS}").rglob("*"))
    kilobytes = int(choose.uniform(0.5, 3.0) * one / 1024) + 64
    folder = workdir / "checkpoints"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], check=True)
    pod = Pod(work, workdir)
    code = pod.ends()
    if code:
        assert code == 1 and "the disk is full" in pod.text, (code, pod.text)
    subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
    return f"{kilobytes} KiB for checkpoints, code {code}"


def corrupted(work: Work, workdir: Path, choose: random.Random) -> str:
    pod = Pod(work, workdir)
    pod.reaches(choose.randint(3 * EVERY, STEPS - 1))
    end_all(pod)
    newest = max(
        (p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()),
        key=lambda path: int(path.name),
    )
    files = [
        path
        for path in newest.rglob("*")
        if path.is_file() and (path.parent.name == "d" or path.parent.name == "streams")
        and path.name != "commit_success.txt" and "ocdbt.process" not in str(path)
    ]  # fmt: skip
    victim = choose.choice(sorted(files))
    how = choose.choice(("truncated", "changed", "deleted"))
    data = bytearray(victim.read_bytes())
    if how == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        place = choose.randrange(len(data))
        data[place] ^= 1 << choose.randrange(8)
        victim.write_bytes(data)
    else:
        victim.unlink()
    again = Pod(work, workdir)
    code = again.ends()
    assert code == 0, (code, again.text)
    found = "is damaged" in again.text
    return (
        f"{victim.relative_to(workdir)} {how}: {'reported' if found else 'restored all the same'}"
    )


def deleted_shard(work: Work, workdir: Path, choose: random.Random) -> str:
    records = workdir.with_name(f"{workdir.name}-records")
    shutil.copytree(work.records, records)
    mine = argparse.Namespace(root=work.root, records=records)
    pod = Pod(mine, workdir)
    step = choose.randint(1, STEPS - 1)
    pod.reaches(step)
    victim = choose.choice(sorted(records.glob("*.array_record")))
    aside = victim.with_suffix(".aside")
    victim.rename(aside)
    end_all(pod)
    again = Pod(mine, workdir)
    code = again.ends()
    assert code == 1 and f"{victim} is missing" in again.text, (code, again.text)
    aside.rename(victim)
    last = Pod(mine, workdir)
    assert last.ends() == 0, last.text
    return f"{victim.name} deleted after step {step}"


KINDS: dict[str, Callable[[Work, Path, random.Random], str]] = {
    "kill_one": kill_one,
    "kill_all": kill_all,
    "sigterm": sigterm,
    "kill_in_checkpoint": kill_in_checkpoint,
    "disk_full": disk_full,
    "corrupted": corrupted,
    "deleted_shard": deleted_shard,
}


def trial(kind: str, work: Work, seed: int) -> str:
    """One fault, and the runs after it; returns a description. Raises AssertionError if it left a
    trace."""
    workdir = work.root / f"{kind}-{seed}"
    shutil.rmtree(workdir, ignore_errors=True)
    try:
        happened = KINDS[kind](work, workdir, random.Random(f"{kind} {seed}"))
        if kind != "deleted_shard":  # it has finished, with records of its own
            pod = Pod(work, workdir)
            assert pod.ends() == 0, pod.text
        found = traces(workdir)
        assert found["losses"] == work.expected["losses"], happened
        assert found["streams"] == work.expected["streams"], happened
    finally:
        if kind == "disk_full":
            subprocess.run(["umount", workdir / "checkpoints"], check=False)
    shutil.rmtree(workdir)
    shutil.rmtree(workdir.with_name(f"{workdir.name}-records"), ignore_errors=True)
    return happened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--work", type=Path, default=Path("runs/faults"))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    args.work.mkdir(parents=True, exist_ok=True)
    work, failed = Work(args.work.resolve()), 0
    for number in range(args.times):
        for kind in args.kinds:
            started_at = time.monotonic()
            try:
                happened = trial(kind, work, args.seed + number)
            except AssertionError as error:
                failed += 1
                happened = f"FAILED: {error}"
            seconds = time.monotonic() - started_at
            print(f"{kind} {args.seed + number}: {happened} ({seconds:.0f} s)", flush=True)
    print(f"{failed} of {args.times * len(args.kinds)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
