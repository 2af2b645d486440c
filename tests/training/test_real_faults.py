"""Faults at random moments (slow): after a restart no trace of them is left."""

import os
import signal

import faults
import pytest


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return faults.Work(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", faults.KINDS)
def test_faults_leave_no_trace(work, kind, seed):
    if kind == "disk_full" and not faults.can_mount():
        pytest.skip("a small disk can't be mounted here")
    for drawn in (seed % 10**6, (seed + 1) % 10**6):
        print(f"python tests/faults.py --kinds {kind} --times 1 --seed {drawn}")
        print(faults.trial(kind, work, drawn))


@pytest.mark.slow
def test_a_silent_process_is_named(work):
    run = faults.Pod(work, work.root / "silent", more=["--config.faults.hang_seconds=8"])
    run.reaches(3)
    os.kill(run.members()[1], signal.SIGSTOP)
    assert run.ends() == 75, run.text
    assert "nothing has happened for" in run.text and "process 1 (" in run.text
    assert "sends no heartbeats" in run.text
    again = faults.Pod(work, work.root / "silent", more=["--config.faults.hang_seconds=300"])
    assert again.ends() == 0, again.text
    assert faults.traces(work.root / "silent")["losses"] == work.expected["losses"]
