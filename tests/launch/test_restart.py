"""Runs on hosts: what is restarted, what isn't, and a preempted slice, with mocks."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
seen = Path("seen")
turn = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (turn + 1))
action = sys.argv[1:][turn]
if action.startswith("wait"):  # to be told, as training is before a preemption
    if action == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(75)))
    if action == "wait_for_ctrl_c":
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.3), sys.exit(75)))
    Path("waits").touch()
    time.sleep(60)
if action.startswith("signal"):
    os.kill(os.getpid(), int(action.removeprefix("signal")))
sys.exit(int(action))
"""


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as on a terminal; background processes have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def restarted(folder: Path, *actions: str, pause: str = "0.01", **options) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", ROOT / "launch/restart.sh", "python3", "-c", PROGRAM, *actions], cwd=folder,
        env=os.environ | {"BLTJAX_RESTART_PAUSE": pause}, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("actions", "code", "turns"),
    [
        (["0"], 0, 1),
        (["75", "signal9", "signal6", "0"], 0, 4),
        (["75", "1", "0"], 1, 2),
        (["2", "0"], 2, 1),
        (["130", "0"], 130, 1),
        (["75"] * 25, 1, 20),
    ],
)
def test_what_is_started_again(tmp_path, actions, code, turns):
    process = restarted(tmp_path, *actions)
    errors = process.communicate()[1]
    assert process.returncode == code, errors
    assert len((tmp_path / "seen").read_text()) == turns
    assert errors.count("restart.sh: exit code") == turns - (turns < 20)


def until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("action", ["wait", "wait_unaware"])
def test_sigterm_is_passed_on_and_ends_it(tmp_path, action):
    process = restarted(tmp_path, action, "0")
    until((tmp_path / "waits").exists)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == ""
    assert process.returncode == 75
    assert (tmp_path / "seen").read_text() == "x"


@pytest.mark.parametrize(("action", "turns"), [("wait_for_ctrl_c", 1), ("75", 1)])
def test_ctrl_c_ends_it_whatever_the_command_does(tmp_path, action, turns):
    """The terminal sends it to both; after a code of 75 it comes while the script waits."""
    process = restarted(tmp_path, action, "0", pause="20", start_new_session=True)
    if action == "75":
        assert b"again in 20 s" in process.stderr.buffer.readline()
    else:
        until((tmp_path / "waits").exists)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert len((tmp_path / "seen").read_text()) == turns


@pytest.fixture
def host(tmp_path):
    """A copy of the launchers whose Python is a mock; returns what runs host.sh there."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def run(*words: str, script: str = "") -> str:
        if script:
            python.write_text(f"#!/usr/bin/env bash\n{script}\n")
            python.chmod(0o755)
        done = subprocess.run(
            ["bash", "launch/host.sh", *words], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"BLTJAX_RESTART_PAUSE": "0.01"},
        )  # fmt: skip
        return done.stdout.strip().split(" ", 1)[-1] if done.returncode == 0 else done.stderr

    return run


def test_host(host, tmp_path):
    assert host("state") == "idle"
    script = 'echo "$#:$5:$JAX_PLATFORMS"; exit 3'
    assert host("start", "train", "a  b", script=script) == "started: train a  b"
    until(lambda: host("state") == "ended 3")
    assert (tmp_path / "runs" / "host.log").read_text() == "5:a  b:tpu,cpu\n"
    host("start", "train", script="while [ ! -e stop ]; do sleep 0.05; done")
    until(lambda: host("state").startswith("running "))
    assert "a run is going on" in host("start", "train")
    (tmp_path / "stop").touch()
    until(lambda: host("state") == "ended 0")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_slurm_job(tmp_path, code, requeued):
    """The batch script with mocks of srun and scontrol: it is requeued only after 75."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    for name, script in (("srun", f'printf "%s|" "$@"; exit {code}'), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path / "venv"),
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm_job.sh", "train", "--workdir=/a b"],
        env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "|launch/restart.sh|python|-u|-m|bltjax|train|--workdir=/a b|" in done.stdout
    assert done.stdout.endswith("requeue 7\n") == requeued


# A gcloud whose slices are preempted during the first run and finish the second.
GCLOUD = """#!/usr/bin/env bash
echo "$4 $*" >> calls
turn=$(grep -c '^create' calls || true)
case "$4" in
    create) exit "${CREATE:-0}" ;;
    describe)
        case "$(grep -oE '^(create|delete)' calls | tail -n 1)" in ''|delete) exit 1 ;; esac
        if [ "$turn" -eq 1 ] && grep -q 'start train' calls; then echo SUSPENDED; exit; fi
        echo ACTIVE ;;
    ssh)
        case "$*" in
            *"host.sh state"*) printf "host-%s\\n" "0 ended ${FIRST:-0}" "1 ended ${LAST:-0}" ;;
        esac ;;
esac
"""


def kept(tmp_path, **variables) -> subprocess.CompletedProcess:
    mock = tmp_path / "gcloud"
    mock.write_text(GCLOUD.replace("calls", str(tmp_path / "calls")))
    mock.chmod(0o755)
    command = "bash launch/tpu_vm.sh keep --name b --zone us-east5-a --topology v5e:4x4 --every 1"
    return subprocess.run(
        [*command.split(), "--", "train", "--workdir=gs://b/run"], cwd=ROOT, text=True,
        capture_output=True, timeout=60,
        env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip


def test_a_preempted_slice_is_made_again(tmp_path):
    done = kept(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "b is SUSPENDED: its slices are gone" in done.stdout
    calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls.count("create") == 2 and calls.count("delete") == 1 and calls.count("scp") == 2
    assert calls.index("delete") < len(calls) - 1 - calls[::-1].index("create")


def test_a_host_that_failed_is_named_and_nothing_is_made_again(tmp_path):
    done = kept(tmp_path, FIRST="75", LAST="1")  # the error counts, not who waited for that host
    assert done.returncode == 1
    assert "host-0 ended 75\nhost-1 ended 1\n" in done.stdout


def test_a_request_that_is_refused_is_not_repeated(tmp_path):
    done = kept(tmp_path, CREATE="1")
    assert done.returncode == 1
    calls = (tmp_path / "calls").read_text()
    assert calls.count("create") == calls.count("--accelerator-type=v5litepod-16") * 2 == 2
    assert "delete" not in calls and "ssh" not in calls
