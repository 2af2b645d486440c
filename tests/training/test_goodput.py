"""Wall time of a run by kind, over its restarts; and the process that blocks the others."""

import json
import subprocess
import sys
import threading

import pytest

from bltjax.distributed import watchdog
from bltjax.distributed.watchdog import Watchdog, silent_or_behind
from bltjax.training.goodput import KINDS, Goodput


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances on request."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

        time = monotonic

    clock = Clock()
    monkeypatch.setattr("bltjax.training.goodput.time", clock)
    return clock


def test_every_second_is_counted_once(tmp_path, clock):
    first = Goodput(tmp_path, started_at=990.0)
    first.resume(0)
    with first.during("input"):
        clock.now += 1
    with first.during("compile"):
        clock.now += 5
    first.begin_steps()
    clock.now += 20
    first.save(10)
    clock.now += 7
    first.write()  # and then the process is killed
    clock.now += 30

    second = Goodput(tmp_path, started_at=clock.now)
    clock.now += 4
    second.resume(10)
    second.begin_steps()
    clock.now += 13
    second.write(ended=True)
    expected = dict.fromkeys(KINDS, 0.0) | {
        "start": 14.0, "input": 1.0, "compile": 5.0, "steps": 33.0, "lost": 7.0, "restarts": 30.0,
    }  # fmt: skip
    assert second.seconds == expected
    assert second.shares()["steps"] == pytest.approx(33 / 90)
    assert "goodput 36.7% of 90 s" in second.summary() and "lost 7.8%" in second.summary()
    clock.now += 1000  # the pause after a requested stop doesn't count
    assert Goodput(tmp_path, started_at=clock.now).seconds["restarts"] == 30.0
    assert json.loads((tmp_path / "goodput.json").read_text())["saved"] == {"10": 20.0}


def test_a_process_has_a_heartbeat_from_the_start(monkeypatch):
    """Or one that stops soon would not be named with its host."""
    sent, came = {}, threading.Event()

    def put(key, value, overwrite):
        sent[key] = json.loads(value)
        came.set()

    monkeypatch.setattr(watchdog, "joined", lambda: True)
    monkeypatch.setattr(watchdog.coordinator, "put", put)
    with Watchdog(10_000):
        assert came.wait(20)
    ((key, (_, step, doing, beats)),) = sent.items()
    assert key == "bltjax/heartbeat/0" and (step, doing, beats) == (0, "starts", 1)


def test_who_keeps_the_others_waiting():
    def beats(*rows):
        return {i: [f"vm-{i}", *beat] for i, beat in enumerate(rows)}

    before = beats((7, "computes", 3), (7, "computes", 3), (7, "computes", 3))
    silent = beats((7, "computes", 5), (7, "computes", 3), (7, "computes", 5))
    assert silent_or_behind(before, silent, 3) == (
        "Look at: process 1 (vm-1) sends no heartbeats; the last: computes, step 7."
    )
    behind = beats((7, "computes", 5), (7, "computes", 5), (6, "waits for data", 5))
    assert "process 2 (vm-2) waits for data at step 6" in silent_or_behind(before, behind, 3)
    other = beats((7, "computes", 5), (7, "waits for data", 5), (7, "computes", 5))
    assert "process 1 (vm-1) waits for data at step 7" in silent_or_behind(before, other, 3)
    assert "process 3 has sent no heartbeat" in silent_or_behind(before, silent, 4)
    alike = beats(*[(7, "computes", 5)] * 3)
    assert silent_or_behind(before, alike, 3) == "All 3 processes are at step 7: computes."


def test_silence_ends_a_program_with_the_code_for_a_restart():
    code = (
        "import time; from bltjax.distributed.watchdog import Watchdog\n"
        "with Watchdog(0.2) as dog: dog.mark(3, 'waits for data'); time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 75
    assert "This process waits for data at step 3" in ended.stderr
