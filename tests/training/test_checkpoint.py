"""Checkpoints of a run: kept as configured, checked when restored, skipped when damaged."""

import contextlib
import errno
import http.server
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from test_train import command, losses

from bltjax.__main__ import main
from bltjax.config.run import CheckpointConfig, RunConfig
from bltjax.distributed.processes import Restart
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.training.checkpoint import StreamsHandler, Writing, checksums, make_manager, save
from bltjax.training.restore import changed_arrays, restore, restore_newest
from bltjax.training.step import TrainState
from bltjax.weights.damage import Misfit, reason, why_not
from bltjax.weights.export import load_params
from bltjax.weights.workdir import saved_steps

# Orbax leaves other readings unfinished when one fails, which then find no event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = RunConfig(
    ByteLMConfig(layers=1, width=8, heads=1, hidden=8, window=4),
    checkpoint=CheckpointConfig(every=1, keep=1, keep_every=2),
)


def small_state(step: int) -> TrainState:
    # More than a kilobyte, so that it lies in a file of its own.
    table = np.random.default_rng(0).normal(size=(2, 30, 40)).astype(np.float32)
    params = {"ngrams_RME": jnp.asarray(table), "norm_E": jnp.full(4, step, jnp.float32)}
    return TrainState(jnp.asarray(step, jnp.int32), params, {"count": jnp.asarray(step)})


def save_steps(workdir: Path, steps) -> None:
    manager = make_manager(workdir, CONFIG)
    for step in steps:
        save(manager, small_state(step), {"0": {"taken": step}}, {"step": step})
    manager.close()


def target_like(state: TrainState) -> TrainState:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


def test_which_checkpoints_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 6))
    assert saved_steps(tmp_path) == [2, 4, 5]
    restored = restore(tmp_path / "checkpoints" / "4", target_like(small_state(0)), [0])
    assert restored.streams == {"0": {"taken": 4}} and int(restored.state.step) == 4
    assert changed_arrays(restored) == ""
    # The files look right, but the arrays don't: one from another step is named.
    other = restored._replace(state=restored.state._replace(params=small_state(3).params))
    assert "norm_E" in changed_arrays(other) and "ngrams_RME" not in changed_arrays(other)


def test_any_changed_bit_changes_the_checksum(seed):
    random_bits = np.random.default_rng(seed)
    array = random_bits.normal(size=(3, 5, 7)).astype(np.float32)
    whole = int(checksums([array])[0])
    for _ in range(20):
        changed = array.copy()
        bits = changed.view(np.uint32).reshape(-1)
        bits[random_bits.integers(bits.size)] ^= np.uint32(1 << int(random_bits.integers(32)))
        assert int(checksums([changed])[0]) != whole
    swapped = array[:, ::-1].copy()
    assert int(checksums([swapped])[0]) != whole


@pytest.mark.parametrize("harm", ["changed", "truncated", "deleted"])
def test_a_damaged_checkpoint_is_moved_aside(runs, tmp_path, capsys, harm):
    """The run resumes from the one before it, with the same losses."""
    copy = tmp_path / "run"
    shutil.copytree(runs.byte_lm, copy)
    newest = copy / "checkpoints" / "12"
    victim = max((newest / "opt" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    if harm == "deleted":
        victim.unlink()
    elif harm == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    before = losses(runs.byte_lm)
    assert main(command(runs, "byte_lm", copy)) == 0
    printed = capsys.readouterr().out
    assert f"{newest} is damaged" in printed and "trying step 8" in printed
    assert f"resumed {copy} after step 8" in printed
    assert (copy / "damaged" / "12" / "progress").exists() and saved_steps(copy) == [8, 12]
    assert losses(copy) == before


def test_the_last_checkpoint_is_left_where_it_is(runs, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(runs.byte_lm, copy)
    shutil.rmtree(copy / "checkpoints" / "8")
    (copy / "checkpoints" / "12" / "streams" / "2.json").write_text("{")
    assert main(command(runs, "byte_lm", copy)) == 1
    error = capsys.readouterr().err
    assert "12 can't be restored" in error and "the only one left" in error
    assert saved_steps(copy) == [12]
    # A checkpoint of another version is not damaged.
    progress = copy / "checkpoints" / "12" / "progress" / "metadata"
    old = json.loads(progress.read_text()) | {"format": 1}
    old.pop("crc32")
    progress.write_text(json.dumps(old))
    assert main(command(runs, "byte_lm", copy)) == 1
    assert "another version of bltjax (format 1, not 3)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["streams/1.json", "progress/metadata"])
def test_one_changed_character_is_damage(runs, tmp_path, capsys, name):
    """JSON that can be read, with another meaning."""
    copy = tmp_path / "run"
    shutil.copytree(runs.byte_lm, copy)
    path = copy / "checkpoints" / "12" / name
    text = path.read_text()
    at = next(at for at, letter in enumerate(text) if letter.isdigit())
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    assert main(["inspect", str(copy)]) == 1
    assert "is not what was saved" in capsys.readouterr().err
    assert main(command(runs, "byte_lm", copy)) == 0
    assert "12 is damaged" in capsys.readouterr().out
    assert losses(copy) == losses(runs.byte_lm)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with steps 4 and 5; any user may read its parents."""
    folder = Path(tempfile.mkdtemp(prefix="bltjax-"))
    folder.chmod(0o755)
    save_steps(folder, range(4, 6))
    yield folder
    shutil.rmtree(folder)


def test_other_arrays_than_the_settings_ask_for(saved, monkeypatch):
    """Nothing is damaged, and nothing is moved; also for checkpoints without stored shapes."""
    state = small_state(0)
    x = state.params["ngrams_RME"]
    others = {
        r"params/ngrams_RME: float32 \(2, 30, 40\) -> float32 \(2, 3, 5\)": state._replace(
            params=state.params | {"ngrams_RME": jnp.zeros((2, 3, 5))}
        ),
        r"params/ngrams_RME: float32 .* -> bfloat16": state._replace(
            params=state.params | {"ngrams_RME": x.astype(jnp.bfloat16)}
        ),
        "params/gate_EF is in the run alone": state._replace(params=state.params | {"gate_EF": x}),
        "opt/count is in it alone": state._replace(opt={}),
    }
    progress = json.loads((saved / "checkpoints/5/progress/metadata").read_text())
    assert progress["shapes"]["params/norm_E"] == "float32 (4,)"
    for remembered in (True, False):
        if not remembered:
            monkeypatch.setattr(
                "bltjax.weights.damage.unsealed_file",
                lambda path, name: {k: v for k, v in progress.items() if k != "shapes"},
            )
        for expected, other in others.items():
            with pytest.raises(ValueError, match=rf"(?s)5 doesn't hold the arrays.*{expected}"):
                restore_newest(saved, target_like(other), [0])
    assert saved_steps(saved) == [4, 5] and not (saved / "damaged").exists()


def test_64_bits_leave_checkpoints_alone(saved):
    folder, target = saved / "checkpoints" / "5", target_like(small_state(0))
    whole = restore(folder, target, [0])
    with jax.enable_x64(True):
        # 32-bit arrays restore unchanged, with the same checksums.
        again = restore(folder, target, [0])
        assert changed_arrays(again) == ""
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), whole.state, again.state))
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), small_state(0).params)
        expected = r"(?s)float32 \(4,\) -> float64 \(4,\).*JAX_ENABLE_X64"
        with pytest.raises(Misfit, match=expected):
            restore(folder, target_like(small_state(0)._replace(params=wide)), [0])


@contextlib.contextmanager
def another_user():
    """This process as a user to whom permissions apply."""
    try:
        os.seteuid(65534)
    except PermissionError:
        pytest.skip("only root can be another user")
    try:
        yield
    finally:
        os.seteuid(0)


def largest_file(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.parent.name == "d" and "process" in str(path)),
        key=lambda path: path.stat().st_size,
    )


def test_what_may_not_be_read_is_not_damaged(saved):
    newest = saved / "checkpoints" / "5"
    target = target_like(small_state(0))
    with another_user():
        assert int(restore_newest(saved, target, [0]).state.step) == 5
    for path in (
        newest,
        newest / "params",
        newest / "opt" / "_METADATA",
        newest / "params" / "manifest.ocdbt",
        largest_file(newest / "params"),
        newest / "streams" / "0.json",
        newest / "progress" / "metadata",
        newest.parent,
    ):
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            with another_user(), pytest.raises((ValueError, OSError), match=r"(?i)permission") as e:
                restore_newest(saved, target, [0])
            assert "is damaged" not in str(e.value)
            if path == newest / "params":
                with another_user(), pytest.raises(OSError, match="ermission"):
                    (path / "_METADATA").read_text()
        finally:
            path.chmod(mode)
        assert saved_steps(saved) == [4, 5] and not (saved / "damaged").exists()


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_too_many_open_files_are_no_damage(saved, monkeypatch):
    # pytest's own would import something, to tell of what Orbax leaves unfinished.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    errors = []
    for spare in range(1, 4):
        taken = [os.open("/", os.O_RDONLY) for _ in range(spare)]  # the file's last numbers
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, hard))
        for descriptor in taken:
            os.close(descriptor)
        try:
            restore_newest(saved, target_like(small_state(0)), [0])
        except (ValueError, OSError) as error:
            errors.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert errors and all("too many open files" in text.lower() for text in errors), errors
    assert any("5 can't be restored" in text for text in errors), errors
    assert saved_steps(saved) == [4, 5]


def test_a_storage_that_is_away_is_no_damage(monkeypatch, tmp_path):
    """TensorStore reading from a server that is busy; the program then exits with 75."""

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("localhost", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    few = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
    store = {"driver": "http", "base_url": f"http://localhost:{server.server_port}/"}
    context = {"http_request_retries": few}

    def read(*_):
        return tensorstore.KvStore.open(store | {"context": context}).result()["x"]

    with pytest.raises(ValueError) as error:
        read()
    assert reason(error.value).kind == "away", error.value
    save_steps(tmp_path, [1])
    monkeypatch.setattr("bltjax.training.restore.restore", read)
    with pytest.raises(Restart, match="1 can't be read now: "):
        restore_newest(tmp_path, target_like(small_state(0)), [0])
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("part", ["index", "list", "tree", "chunks", "progress", "stream"])
@pytest.mark.parametrize("harm", ["changed", "truncated", "empty", "deleted"])
def test_what_is_damage(saved, tmp_path, part, harm):
    folder = tmp_path / "5"
    shutil.copytree(saved / "checkpoints" / "5", folder)
    path = {
        "index": folder / "params" / "_METADATA",
        "list": folder / "opt" / "array_metadatas" / "process_0",
        "tree": folder / "params" / "manifest.ocdbt",
        "chunks": largest_file(folder / "params"),
        "progress": folder / "progress" / "metadata",
        "stream": folder / "streams" / "0.json",
    }[part]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 5
    if harm == "deleted":
        path.unlink()
    else:
        path.write_bytes({"changed": data, "truncated": data[: len(data) // 2], "empty": b""}[harm])
    try:
        restored = restore(folder, target_like(small_state(0)), [0])
    except Exception as error:
        why = why_not(folder, error)
        assert why.kind == "damaged", why
        assert part not in ("index", "list", "progress") or path.name in why.text, why
    else:  # where Orbax needs no such file, or the arrays say it
        assert changed_arrays(restored) or (part, harm) in (
            ("list", "deleted"), ("list", "changed"), ("index", "deleted"), ("index", "changed"),
        )  # fmt: skip


def test_an_error_of_one_process_ends_all(saved, monkeypatch, capsys):
    """Also where the others find the checkpoint damaged, or intact."""
    theirs = ["refused", "PERMISSION_DENIED: Error reading"]
    target = target_like(small_state(0))
    for mine in (None, ["damaged", "a checksum"]):
        monkeypatch.setattr(
            "bltjax.training.restore.allgather_json", lambda what, value, mine=mine: [mine, theirs]
        )
        with pytest.raises(ValueError, match="5 can't be restored: PERMISSION_DENIED"):
            restore_newest(saved, target, [0])
    others = {("unknown", "who knows"): ValueError, ("away", "UNAVAILABLE: later"): Restart}
    for theirs, kind in others.items():
        with pytest.raises(kind, match=theirs[1]):
            restore_newest(saved, target, [0])
    assert saved_steps(saved) == [4, 5] and capsys.readouterr().out == ""


def test_parameters_that_may_not_be_read(runs):
    """A read-only user is not advised to remove the checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="bltjax-"))
    folder.chmod(0o755)
    shutil.copytree(runs.byte_lm, folder / "run")
    largest_file(folder / "run/checkpoints/12/params").chmod(0)
    try:
        with another_user(), pytest.raises(ValueError, match=r"PERMISSION_DENIED.*\n.*fix") as e:
            load_params(folder / "run")
        assert "Remove" not in str(e.value)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def left(monkeypatch):
    """Codes and messages with which one of two processes would have ended."""
    left = []
    monkeypatch.setattr(
        "bltjax.training.checkpoint.exit_now", lambda code, message: left.append((code, message))
    )
    monkeypatch.setattr("bltjax.training.checkpoint.process_count", lambda: 2)
    return left


class Late:
    """A handler's future, whose result is an error."""

    def __init__(self, error: Exception):
        self.error = error

    def result(self, timeout=None):
        raise self.error


@pytest.mark.parametrize(
    ("handler", "method"),
    [
        (StreamsHandler, "async_save"),
        (ocp.StandardCheckpointHandler, "async_save"),
        (ocp.JsonCheckpointHandler, "async_save"),
        (ocp.StandardCheckpointHandler, "finalize"),
    ],
)
def test_a_part_that_cannot_be_written_ends_the_process(
    tmp_path, monkeypatch, request, handler, method
):
    full = OSError(errno.ENOSPC, "No space left on device")

    async def async_save(*_, **options):
        return [Late(full)]

    def finalize(*_):
        raise full

    manager = make_manager(tmp_path, CONFIG)
    left = request.getfixturevalue("left")
    monkeypatch.setattr(handler, method, locals()[method])
    save(manager, small_state(1), {"0": {"taken": 1}}, {"step": 1})
    with pytest.raises(OSError, match="No space left"):
        manager.wait_until_finished()
    assert {code for code, _ in left} == {1}
    assert left[0][1].startswith("a checkpoint can't be written: the disk is full")
    assert saved_steps(tmp_path) == []


def test_another_process_that_was_lost_is_not_this_ones_fault(left, monkeypatch):
    monkeypatch.setattr("bltjax.distributed.processes.joined", lambda: True)

    def fails(error: Exception, cause: Exception | None = None) -> None:
        error.__cause__ = cause
        with pytest.raises(type(error)):
            Writing(Late(error)).result()

    late = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    fails(TimeoutError("while waiting for async_write_complete"), late)
    fails(late)
    assert not left
    fails(TimeoutError(errno.ETIMEDOUT, "Connection timed out", "step/params"))
    fails(KeyError("params"))
    begin = "a checkpoint can't be written: "
    assert left == [
        (1, f"{begin}step/params: connection timed out"),
        (1, f"{begin}KeyError: 'params'"),
    ]
