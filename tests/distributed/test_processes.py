"""Many processes: the same losses as one, whichever ends; mismatches are named."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from test_train import command, losses

from bltjax.__main__ import main
from bltjax.distributed.processes import RESTART, compile_in_lockstep, lost_another

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import local_pod  # noqa: E402


def pod(processes: int, devices: int, words: list[str], code: int = 0) -> str:
    """Runs a verb by launch/local_pod.py; returns its output."""
    start = [sys.executable, "launch/local_pod.py", f"--processes={processes}"]
    run = subprocess.run(
        [*start, f"--devices={devices}", "--", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout


def test_options_that_do_not_fit_together(runs, tmp_path, capsys):
    words = command(runs, "byte_lm", tmp_path)
    for options, message in (
        (["--processes=2"], "belong together"),
        (["--coordinator=here", "--processes=2", "--process=0"], "is 'here', not HOST:PORT"),
        (["--coordinator=a:1", "--processes=2", "--process=2"], "(2) must be 0 ..."),
    ):
        assert main([*words, *options]) == 1
        assert message in capsys.readouterr().err


def test_a_wrong_coordinator_is_named_with_its_address(runs, tmp_path, capsys):
    port = local_pod.free_port()
    where = [f"--coordinator=localhost:{port}", "--processes=2", "--join_seconds=1"]
    assert main([*command(runs, "byte_lm", tmp_path), *where, "--process=1"]) == 75
    assert f"could not reach the coordinator at localhost:{port} in 1 s" in capsys.readouterr().err
    words = [sys.executable, "-m", "bltjax", *command(runs, "byte_lm", tmp_path), *where]
    alone = subprocess.run([*words, "--process=0"], cwd=ROOT, capture_output=True, text=True)
    assert alone.returncode == 75
    assert f"at the coordinator localhost:{port}, but not all of 2 processes came" in alone.stderr


def test_processes_that_differ_are_named(runs, tmp_path):
    """Another setting, and another version of the code."""
    shutil.copytree(ROOT / "bltjax", tmp_path / "bltjax")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    with (tmp_path / "bltjax" / "rotary.py").open("a") as file:
        file.write("# changed\n")
    where = [f"--coordinator=localhost:{local_pod.free_port()}", "--processes=2"]
    words = [sys.executable, "-m", "bltjax", *command(runs, "byte_lm", tmp_path / "run"), *where]
    processes = [
        subprocess.Popen(
            [*words, f"--process={index}", *more], cwd=folder, stderr=subprocess.PIPE, text=True
        )
        for index, folder, more in ((0, ROOT, []), (1, tmp_path, ["--config.optimizer.lr=0.5"]))
    ]
    for process in processes:
        error = process.communicate()[1]
        assert process.returncode == 1, error
        assert "process 1 (" in error and "bltjax.config.optimizer.lr: 0.003 -> 0.5" in error
        assert "versions.sources: " in error
    assert not (tmp_path / "run").exists()


def test_a_process_count_that_does_not_divide_the_batch(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bltjax.training.setup.process_count", lambda: 3)
    assert main(command(runs, "byte_lm", tmp_path)) == 1
    error = capsys.readouterr().err
    assert "the number of processes (3) must divide data.batch_size (4)" in error


def test_a_folder_for_checkpoints_that_can_not_be_written(runs, tmp_path, capsys):
    (tmp_path / "checkpoints").write_text("in the way")
    assert main(command(runs, "byte_lm", tmp_path)) == 1
    captured = capsys.readouterr()
    assert str(tmp_path / "checkpoints") in captured.err and "step 1" not in captured.out


def run_first(folder: Path, monkeypatch) -> None:
    """Every Python started from now on runs this folder's sitecustomize.py first."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests"))))


@pytest.fixture
def one_compiler(monkeypatch):
    """Process 0 compiles the programs of all: with two cores compiling is most of a run."""
    run_first(ROOT / "tests/one_compiler", monkeypatch)
    monkeypatch.setenv("JAX_SHARE_BINARY_BETWEEN_HOSTS", "true")
    monkeypatch.setenv("JAX_SHARE_BINARY_BETWEEN_HOSTS_TIMEOUT_MS", "300000")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["byte_lm", "blt"])
def test_one_two_and_four_processes_are_one(runs, tmp_path, one_compiler, model):
    """50 steps; also held-out figures, and evaluation by as many processes."""
    found = {}
    for count in (1, 2, 4):
        workdir = tmp_path / str(count)
        words = command(runs, model, workdir, "--config.optimizer.steps=50")
        pod(count, 1, [*words, "--config.checkpoint.every=50", "--config.log_every=5"])
        out = tmp_path / f"{count}.json"
        pod(count, 1, ["evaluate", f"--workdir={workdir}", f"--out={out}"])
        held_out = json.loads(out.read_text())["bits_per_byte"]
        found[count] = losses(workdir) | {"held out": held_out}
    assert len(found[1]) == 11
    for count in (2, 4):
        assert found[count] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
def test_another_mesh_and_process_count_resumes(runs, tmp_path, one_compiler):
    words = ["--config.data.batch_size=8", "--config.optimizer.steps=12"]
    whole = tmp_path / "whole"
    pod(4, 2, command(runs, "blt", whole, *words))
    saved = tmp_path / "saved"
    pod(4, 2, command(runs, "blt", saved, *words, "--stop_at=4"))
    for processes, devices in ((1, 8), (2, 2), (8, 1)):
        copy = tmp_path / f"{processes}x{devices}"
        shutil.copytree(saved, copy)
        printed = pod(processes, devices, command(runs, "blt", copy, *words))
        assert "after step 4" in printed
        assert losses(copy) == pytest.approx(losses(whole), abs=1e-5)


def begin_with(program: str, folder: Path, monkeypatch) -> None:
    """Every Python started from now on runs this program first."""
    (folder / "sitecustomize.py").write_text(program)
    run_first(folder, monkeypatch)


@pytest.mark.slow
def test_folders_of_a_checkpoint_come_late(runs, tmp_path, monkeypatch):
    """Process 1 would write before process 0 has made the folders, without waiting."""
    program = "from private_names import make_folders_late; make_folders_late()"
    begin_with(program, tmp_path, monkeypatch)
    pod(2, 1, command(runs, "byte_lm", tmp_path / "run"))
    assert losses(tmp_path / "run") == pytest.approx(losses(runs.byte_lm), abs=1e-5)


@pytest.mark.slow
def test_a_process_compiles_much_later_than_the_others(runs, tmp_path, monkeypatch):
    """They wait for it before the first collective, where gloo would give it 30 s."""
    programs = ("jit_step", "jit_checksums")
    program = f"compile_late(1, {programs}, seconds=40, marks={str(tmp_path)!r})"
    begin_with(f"from private_names import compile_late; {program}", tmp_path, monkeypatch)
    pod(2, 2, command(runs, "byte_lm", tmp_path / "run"))
    assert {path.name for path in tmp_path.glob("jit_*")} == set(programs)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs.byte_lm), abs=1e-5)


def test_a_process_of_a_cluster_runs_one_model_after_another(monkeypatch):
    """As in the quickstart: each model has programs of its own, and none is compiled twice."""
    met = []
    monkeypatch.setattr("bltjax.distributed.processes.joined", lambda: True)
    monkeypatch.setattr("bltjax.distributed.processes.barrier", lambda *_: met.append("compiled"))
    double = compile_in_lockstep(jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree)))
    for size, programs in ((2, 1), (3, 2), (2, 2)):
        assert double({"x": jax.numpy.arange(size)})["x"].tolist() == [*range(0, 2 * size, 2)]
        assert len(met) == programs


FULL_DISK = """
import errno, sys, threading
import bltjax.weights.workdir

sealed = bltjax.weights.workdir.sealed

def sealed_or_not(values):
    if "--process={process}" in sys.orig_argv and threading.current_thread().name != "MainThread":
        raise OSError(errno.ENOSPC, "No space left on device")
    return sealed(values)

bltjax.weights.workdir.sealed = sealed_or_not
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_one_process_cannot_write_its_part(process, runs, tmp_path, monkeypatch):
    """It logs the error and ends at once; the launcher ends the other, which wrote its part and
    waits."""
    begin_with(FULL_DISK.format(process=process), tmp_path, monkeypatch)
    started_at = time.monotonic()
    said = pod(2, 1, command(runs, "byte_lm", tmp_path / "run"), code=1)
    assert "a checkpoint can't be written: the disk is full" in said, said
    assert time.monotonic() - started_at < 400, said  # Orbax alone would give up after 1200


def test_a_broken_collective_is_a_lost_process(monkeypatch):
    """jax reports it by either kind of error."""
    text = "UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]: Connection reset by peer"
    for error in (ValueError(text), jax.errors.JaxRuntimeError(text)):
        assert not lost_another(error)
        with monkeypatch.context() as patch:
            patch.setattr("bltjax.distributed.processes.joined", lambda: True)
            assert lost_another(error)
            assert not lost_another(ValueError("the number of processes (3) must divide it (4)"))


def test_the_code_of_a_pod_is_the_one_that_says_most():
    assert local_pod.code_of([0, 0]) == 0
    assert local_pod.code_of([0, -9]) == local_pod.RESTART == RESTART
    assert local_pod.code_of([75, 1, -15]) == 1


def stand_in(folder: Path, program: str) -> None:
    """A bltjax that consists of this program only."""
    (folder / "bltjax").mkdir()
    (folder / "bltjax" / "__init__.py").touch()
    (folder / "bltjax" / "__main__.py").write_text(program)


def test_a_pod_ends_when_one_process_does_and_restarts(tmp_path, monkeypatch, capfdbinary):
    """The first time process 1 exits with 75 and process 0 would wait for ever."""
    stand_in(
        tmp_path,
        "import sys, time, pathlib\n"
        "me = sys.argv[-1][-1]\n"
        "print('hello', *sys.argv[1:2], flush=True)\n"
        "mark = pathlib.Path(f'mark{me}')\n"
        "again = mark.exists()\n"
        "mark.touch()\n"
        "if me == '1' and not again: sys.exit(75)\n"
        "time.sleep(0 if again else 60)",
    )
    monkeypatch.setattr(local_pod, "ROOT", tmp_path)
    monkeypatch.setattr(local_pod, "ENDS_SECONDS", 0.2)
    words = ["--processes=2", "--devices=1", "--restarts=3", "--", "verb"]
    assert local_pod.main(words) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert lines.count("[0] hello verb") == lines.count("[1] hello verb") == 2
    assert "[0] outlived another one, and is killed" in lines
    assert "processes ended with -9, 75" in lines and "restart 1 of at most 3" in lines
    (tmp_path / "mark1").unlink()
    assert local_pod.main([*words[:2], "--", "verb"]) == RESTART


def test_a_pod_whose_reader_has_seen_enough_ends(tmp_path):
    """As in `local_pod.py ... | head -1`, with processes that would continue to print."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    stand_in(
        tmp_path,
        "import time\n"
        "for step in range(600):\n"
        "    print('step', step, 'and so on' * 9999, flush=True)\n"
        "    time.sleep(0.1)",
    )
    words = [sys.executable, "launch/local_pod.py", "--processes=2", "--", "verb"]
    run = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"step 0" in run.stdout.readline()
    run.stdout.close()
    try:
        assert run.wait(timeout=30) == RESTART  # none saved: they were ended by a signal
    finally:
        run.terminate()
    assert run.stderr.read() == b""
