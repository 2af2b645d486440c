"""One process at a time in a folder, whoever else wants it, and whoever is killed."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from etils import epath
from test_entropies import part
from test_processes import pod
from test_storage import Bucket, bucket  # noqa: F401 (a fixture)
from test_train import command, losses

from bltjax.__main__ import main
from bltjax.convert.convert import convert
from bltjax.system import lock, lock_file, owner

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"host": "tpu-vm-3", "boot": "another", "machine": "another"}


@contextlib.contextmanager
def hold(path, lost=lambda message: None, *, stale=lock.STALE, refresh=None, **options):
    names = dict(name="runs/x", instead="another --workdir")
    with (
        mock.patch.multiple(lock, STALE=stale, REFRESH=refresh or lock.REFRESH),
        lock.held(path, "train", **names, lost=lost, **options) as held,
    ):
        yield held


def leave_lock(path: Path, age: float = 0.0, **changes) -> owner.Holder:
    """A lock left by another process, so many seconds ago."""
    holder = dataclasses.replace(owner.this_process("train"), **changes)
    path.write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return holder


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def trials(folder: Path, kind: str, times: int, seed: int = 0) -> dict:
    words = [sys.executable, str(ROOT / "tests/lock_trials.py"), str(folder), f"--kind={kind}"]
    done = subprocess.run(
        [*words, f"--times={times}", f"--seed={seed}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_of_two_threads_holds_it(tmp_path):
    """300 times each; the file found while one holds the lock is that one's."""
    path, wrong, turns = tmp_path / ".lock", [], []

    def contend(number: int) -> None:
        for _ in range(300):
            holder = owner.this_process("trial")
            while True:
                try:
                    lock.take(path, holder)
                    break
                except lock.InUse:
                    time.sleep(0.0002)
            turns.append(number)
            try:
                os.close(os.open(tmp_path / "witness", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                wrong.append(number)
            (tmp_path / "witness").unlink(missing_ok=True)
            lock.drop(path, holder)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sorted(turns) == [0] * 300 + [1] * 300
    assert not list(tmp_path.iterdir())


def test_one_of_two_processes_holds_it(tmp_path):
    assert trials(tmp_path, "contend", 200) == {"ended": [0, 0]}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("times", "seed"), [(12, 0), pytest.param(300, None, marks=pytest.mark.slow)]
)
def test_one_of_many_takes_a_lock_over_wherever_others_are_killed(tmp_path, times, seed):
    seed = time.time_ns() % 10**6 if seed is None else seed
    print(f"seed {seed}")
    found = trials(tmp_path, "crash", times, seed)
    assert found["codes"].keys() == {"0", "9"} and found["last"] < 5
    assert min(found["codes"].values()) > times  # of 4 each time; both happen often


def test_a_lock_whose_process_is_gone_is_taken_over_at_once(tmp_path, capsys):
    path = tmp_path / ".lock"
    unreaped = subprocess.Popen(["true"])
    os.waitid(os.P_PID, unreaped.pid, os.WEXITED | os.WNOWAIT)
    start = owner.state_and_start(unreaped.pid)[1]
    for gone in (
        {"pid": ended_process()},
        {"pid": os.getppid(), "start": "1"},  # its number was reused
        {"pid": unreaped.pid, "start": start},
        {"boot": "of yesterday", "machine": owner.here()["machine"]},
        {},  # of this process, which has forgotten it
    ):
        if "machine" in gone and not gone["machine"]:
            continue
        left = leave_lock(path, **gone)
        started_at = time.monotonic()
        with hold(path) as held:
            assert lock_file.look(path).holder == held.holder != left
        assert time.monotonic() - started_at < 5 and not path.exists()
    assert capsys.readouterr().out == ""
    unreaped.wait()


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_processes_are_known_without_proc():
    mine = owner.state_from_ps(os.getpid())
    assert mine == owner.state_from_ps(os.getpid()) and mine[0] in "RS" and len(mine[1]) > 20
    assert owner.state_from_ps(os.getppid())[1] and owner.state_from_ps(ended_process()) is None


def test_who_holds_it_is_named(tmp_path):
    path = tmp_path / "new" / ".lock"
    message = (
        rf"runs/x is in use by process {os.getpid()} on .+ since 20.* UTC \(train\): wait for it"
    )
    for take_over in (False, True):  # never from a process known to be alive
        with (
            hold(path),
            pytest.raises(ValueError, match=message) as refused,
            hold(path, take_over=take_over),
        ):
            pass
    assert str(refused.value).endswith("stop it, or give another --workdir")
    parent = owner.state_and_start(os.getppid())
    leave_lock(path, pid=os.getppid(), start=parent[1])
    with pytest.raises(ValueError, match=f"process {os.getppid()} on"), hold(path):
        pass
    assert path.exists()


def test_a_lock_of_another_host_is_watched(tmp_path, capsys):
    path = tmp_path / ".lock"
    leave_lock(path, age=100.0, **ELSEWHERE)
    with hold(path):
        assert capsys.readouterr().out == ""  # that was long enough
    leave_lock(path, age=-3600.0, **ELSEWHERE)  # a clock that is wrong
    started_at = time.monotonic()
    with hold(path, take_over=True):
        assert time.monotonic() - started_at < 5
    leave_lock(path, age=0.1, **ELSEWHERE)
    with hold(path, stale=0.4):
        assert "waiting to see whether tpu-vm-3 process" in capsys.readouterr().out
        assert time.monotonic() - started_at > 0.3
    left = leave_lock(path, **ELSEWHERE)
    ended = threading.Event()
    refresh = threading.Thread(target=lambda: ended.wait(0.2) or os.utime(path))
    refresh.start()
    with (
        pytest.raises(ValueError, match=r"on tpu-vm-3 since .*; if that process is gone, --take"),
        hold(path, stale=30.0),
    ):
        pass
    refresh.join()
    assert lock_file.look(path).holder == left


def test_a_lock_that_says_nothing_counts_by_its_age(tmp_path):
    path = tmp_path / ".lock"
    for text in ("", "{", '{"pid": 1}', "\0" * 100, json.dumps({"pid": -1, **ELSEWHERE})):
        path.write_text(text)
        os.utime(path, (path.stat().st_mtime - 100,) * 2)
        with hold(path):
            pass
        path.write_text(text)
        with hold(path, stale=0.1):
            pass
    path.write_text("")
    touch = threading.Timer(0.1, lambda: os.utime(path))
    touch.start()
    with (
        pytest.raises(ValueError, match="by a process that can't be named"),
        hold(path, stale=30.0),
    ):
        pass
    touch.join()
    # A lock that is just being written is read again later.
    path.write_text("")
    touch = threading.Timer(0.1, lambda: leave_lock(path, pid=ended_process()))
    touch.start()
    with hold(path, stale=30.0):
        pass


def test_it_is_refreshed_and_whoever_lost_it_is_notified(tmp_path):
    path, messages = tmp_path / ".lock", []
    with hold(path, messages.append, refresh=0.02) as held:
        os.utime(path, (0, 0))
        until(lambda: path.stat().st_mtime > 0)
        path.unlink()  # by a person
        until(path.exists)
        assert held.check() and not messages
        other = leave_lock(path, **ELSEWHERE)
        until(lambda: messages)
        assert f"taken over by process {other.pid} on tpu-vm-3" in messages[0] and not held.check()
    assert lock_file.look(path).holder == other  # not ours to remove


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_it_is_released_however_the_work_ends(tmp_path):
    path = tmp_path / ".lock"
    old = tmp_path / f".lock.{'a' * 32}.partial"
    old.write_text("")
    os.utime(old, (0, 0))
    for error in (ValueError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)), hold(path):
            raise error
        assert not path.exists() and not path.with_suffix(".partial").exists()
    assert not list(tmp_path.iterdir())  # old leftovers, too


def test_file_systems_without_links(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("bltjax.system.lock.os.link", refuses)
    path = tmp_path / ".lock"
    with hold(path) as held:
        assert lock_file.look(path).holder == held.holder
        with pytest.raises(ValueError, match="is in use"), hold(path):
            pass
    leave_lock(path, pid=ended_process())
    with hold(path):
        assert len(list(tmp_path.iterdir())) == 1
    assert not path.exists()


def test_names_as_long_as_any(tmp_path):
    path = tmp_path / f".{'ż' * 124}.lock"
    assert len(os.fsencode(path.name)) == 254
    for _ in range(2):
        with hold(path):
            pass
        leave_lock(path, pid=ended_process())
    path.unlink()
    assert not list(tmp_path.iterdir())


def test_a_process_that_ends_while_it_is_asked_after_is_gone(tmp_path, monkeypatch):
    """Not unknown, in which case its lock would be watched."""
    process = subprocess.Popen(["sleep", "60"])
    left = leave_lock(tmp_path / ".lock", pid=process.pid, start="1")

    def ends(pid: int) -> None:
        process.kill()
        process.wait()

    monkeypatch.setattr("bltjax.system.owner.state_and_start", ends)
    assert owner.runs(left) is False


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), hold(tmp_path / "file" / "run" / ".lock"):
        pass


def test_a_lock_in_a_bucket(bucket, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(lock_file, "SETTLE", 0.01)
    path = bucket / "run" / ".lock"
    with hold(path, refresh=0.02) as held:
        before = path.read_text()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), hold(path):
            pass
        until(lambda: path.read_text() != before)
        assert held.check()
    assert not path.exists()
    other = dataclasses.replace(owner.this_process("train"), **ELSEWHERE)
    path.write_text(json.dumps(dataclasses.asdict(other)))
    with hold(path, stale=0.2):
        assert "waiting to see whether tpu-vm-3" in capsys.readouterr().out
    assert not [name for name in Bucket.store if "lock" in name]


def test_commands_refuse_what_is_in_use(runs, tmp_path, capsys):
    """They change nothing; read-only commands still work."""
    run, records = tmp_path / "run", tmp_path / "records"
    shutil.copytree(runs.byte_lm, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with hold(run / ".lock"):
        assert main([*command(runs, "byte_lm", run, "--config.seed=1"), "--take_over"]) == 1
        assert f"{run} is in use by process {os.getpid()} on" in capsys.readouterr().err
        assert main(["inspect", str(run), "--quick"]) == 0
        assert main(["page", str(run), "--samples=0"]) == 0
        (run / "page.html").unlink()
        (run / ".lock").unlink()
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with (
        hold(records / ".lock-1-of-2"),
        pytest.raises(ValueError, match=r"records, process 1 of 2, is in use by .*another --out"),
    ):
        part(runs, records, 1, 2)
    assert not list(records.iterdir())
    with (
        hold(tmp_path / ".export.lock"),
        pytest.raises(ValueError, match=r"export is in use .* or give another destination"),
    ):
        convert(epath.Path(runs.byte_lm), epath.Path(tmp_path / "export"), "orbax")
    assert not (tmp_path / "export").exists()
    convert(epath.Path(runs.byte_lm), epath.Path(tmp_path / "export"), "orbax")
    assert not [path for path in tmp_path.rglob("*.lock*")]
    assert not [
        path for root in (runs.byte_lm, runs.root / "records") for path in root.rglob(".l*")
    ]


@pytest.mark.slow
def test_all_processes_of_a_run_are_refused(runs, tmp_path):
    with hold(tmp_path / ".lock"):
        printed = pod(2, 1, command(runs, "byte_lm", tmp_path), code=1)
    assert printed.count(f"{tmp_path} is in use by process {os.getpid()} on") == 2


@pytest.mark.slow
@pytest.mark.parametrize("time", range(5))
def test_two_runs_of_one_command_at_once(runs, tmp_path, time):
    words = command(runs, "byte_lm", tmp_path, "--config.optimizer.steps=60")
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "bltjax", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for _ in range(2)
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], errors
    winner = both[codes.index(0)]
    assert f"is in use by process {winner.pid} on {owner.here()['host']}" in errors[codes.index(1)]
    assert sorted(losses(tmp_path)) == list(range(1, 61)) and not (tmp_path / ".lock").exists()
