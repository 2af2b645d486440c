"""Checkpoints of a run: kept as asked, checked when restored, and fallen back from when damaged."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train import command, losses

from bltjax.__main__ import main
from bltjax.checkpoint import TrainState, saved_steps
from bltjax.config import ByteLMConfig, CheckpointConfig, RunConfig
from bltjax.saving import (
    StreamsHandler,
    Writing,
    checksums,
    damage,
    make_manager,
    restore,
    save,
)

CONFIG = RunConfig(
    byte_lm=ByteLMConfig(layers=1, width=8, heads=1, hidden=8, window=4),
    checkpoint=CheckpointConfig(every=1, keep=1, keep_every=2),
)


def small_state(step: int) -> TrainState:
    params = {"ngrams_RME": jnp.arange(24.0).reshape(2, 3, 4), "norm_E": jnp.full(4, step)}
    return TrainState(jnp.asarray(step, jnp.int32), params, {"count": jnp.asarray(step)})


def test_which_checkpoints_are_kept(tmp_path):
    manager = make_manager(tmp_path, CONFIG)
    for step in range(1, 6):
        save(manager, small_state(step), {"0": {"taken": step}}, {"step": step})
    manager.close()
    assert saved_steps(tmp_path) == [2, 4, 5]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), small_state(0)
    )
    restored = restore(tmp_path / "checkpoints" / "4", target, [0])
    assert restored.streams == {"0": {"taken": 4}} and int(restored.state.step) == 4
    assert damage(restored) == ""
    # What the files can't tell, the arrays do: one that is another step's is named.
    other = restored._replace(state=restored.state._replace(params=small_state(3).params))
    assert "norm_E" in damage(other) and "ngrams_RME" not in damage(other)


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
    """The run goes on from the one before it, and comes to the same losses."""
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
    assert "12 can't be restored" in error and "the last one that there is" in error
    assert saved_steps(copy) == [12]
    # One of another version is not damaged.
    progress = copy / "checkpoints" / "12" / "progress" / "metadata"
    old = json.loads(progress.read_text()) | {"format": 1}
    old.pop("crc32")
    progress.write_text(json.dumps(old))
    assert main(command(runs, "byte_lm", copy)) == 1
    assert "another version of bltjax (format 1, not 3)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["streams/1.json", "progress/metadata"])
def test_one_changed_character_is_damage(runs, tmp_path, capsys, name):
    """JSON that can be read, and means something else."""
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


@pytest.fixture
def left(monkeypatch):
    """Codes and messages with which one of two processes would have ended."""
    left = []
    monkeypatch.setattr("bltjax.saving.leave", lambda code, message: left.append((code, message)))
    monkeypatch.setattr("bltjax.saving.process_count", lambda: 2)
    return left


class Late:
    """What a handler returns, and what comes of it."""

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
    monkeypatch.setattr("bltjax.processes.joined", lambda: True)

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
    told = "a checkpoint can't be written: "
    assert left == [
        (1, f"{told}step/params: connection timed out"),
        (1, f"{told}KeyError: 'params'"),
    ]
