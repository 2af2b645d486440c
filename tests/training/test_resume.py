"""A run resumed with other settings: refused, or equal to an uninterrupted run, and logged."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import pytest
from test_train import command, losses

from bltjax.__main__ import main
from bltjax.config.fields import Change, changes
from bltjax.config.run import FaultsConfig, OptimizerConfig
from bltjax.distributed.preemption import INTERRUPTED, TERMINATED, Notice
from bltjax.distributed.sharding import make_mesh
from bltjax.training.checkpoint import last_good
from bltjax.training.init import check_copies, check_start, entropy_model, mesh_advice
from bltjax.training.resume import (
    check_settings,
    check_sources,
    check_workdir,
    refusal,
    setting_changes,
)
from bltjax.training.train import train
from bltjax.weights.workdir import CONFIG, newest_progress, read_run_config, sealed


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as on a terminal; pytest's workers have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def replaced(config, path: str, value):
    """The config with one setting at a dotted path."""
    name, _, rest = path.partition(".")
    if name == getattr(getattr(config, "model", None), "group", ""):
        name = "model"
    inner = config[name] if isinstance(config, dict) else getattr(config, name)
    value = replaced(inner, rest, value) if rest else value
    if isinstance(config, dict):
        return config | {name: value}
    return dataclasses.replace(config, **{name: value})


def copy_of(run, folder, *, newest=None):
    """A copy of a run, with the checkpoint of step `newest` as its newest."""
    shutil.copytree(run, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if newest is not None and int(checkpoint.name) > newest:
            shutil.rmtree(checkpoint)
    return folder


@pytest.mark.parametrize("model", ["byte_lm", pytest.param("blt", marks=pytest.mark.slow)])
def test_how_a_step_is_computed_may_change_and_its_losses_stay(runs, tmp_path, capsys, model):
    """Remat, attention, micro-batches, evaluation; and other paths of the inputs."""
    before = getattr(runs, model)
    work = copy_of(before, tmp_path / "run", newest=8)
    shutil.copytree(runs.root / "records" / "train", tmp_path / "moved")
    shutil.copy(runs.root / "train.jsonl", tmp_path / "moved.jsonl")
    moved = tmp_path / ("moved" if model == "blt" else "moved.jsonl")
    stacks = ("blt.local", "blt.latent") if model == "blt" else ("byte_lm",)
    words = [
        *(f"--config.{stack}.remat=full" for stack in stacks),
        "--config.attention=dense",
        "--config.optimizer.grad_accum_steps=2",
        "--config.mesh.fsdp=1",
        "--config.checkpoint.keep=3",
        "--config.evaluate_every=100",
        "--config.faults.bad_batch=skip",
        f"--config.data.train.text.path={moved}",
        f"--config.data.eval.text.path={moved}",
        *(["--config.entropy_model=gone"] if model == "blt" else []),
    ]
    capsys.readouterr()
    assert main(command(runs, model, work, *words)) == 0
    out = capsys.readouterr().out
    lines = [
        "resumed",
        f"changed: {stacks[0]}.remat: 'none' -> 'full'",
        "changed: attention: 'auto' -> 'dense'",
        "changed: optimizer.grad_accum_steps: 1 -> 2",
        "changed: mesh.fsdp: -1 -> 1",
        "changed: faults.bad_batch: 'stop' -> 'skip'",
        "changed: data.train.text.path: ",
        "source 'text' has another name, and the same documents",
    ]
    if model == "blt":
        lines += ["entropy_model: gone does not exist; the run's own copy is used"]
    for line in lines:
        assert line in out, out
    found, straight = losses(work), losses(before)
    assert sorted(found) == list(range(1, 13))
    for step, loss in straight.items():
        assert found[step] == pytest.approx(loss, abs=1e-5)
    config = read_run_config(work)
    assert (config.attention, config.mesh.fsdp, config.checkpoint.keep) == ("dense", 1, 3)


def test_a_finished_run_goes_on_until_a_person_interrupts_it(runs, tmp_path, capsys):
    """With a truncated config.json, and a checkpoint from before there were fingerprints."""
    work = copy_of(runs.byte_lm, tmp_path / "run")
    (work / CONFIG).write_text('{"byte_lm": {"la')
    path = work / "checkpoints" / "12" / "progress" / "metadata"
    progress = json.loads(path.read_text())
    assert set(progress.pop("sources")) == {"text"} and progress.pop("crc32")
    path.write_text(json.dumps(sealed(progress)))
    shutil.copy(runs.root / "train.jsonl", tmp_path / "moved.jsonl")

    def interrupt():
        while max(losses(work), default=0) < 14:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    words = ["--config.optimizer.steps=3000", "--config.evaluate_every=3000"]
    words += [f"--config.data.train.text.path={tmp_path / 'moved.jsonl'}"]
    thread = threading.Thread(target=interrupt, daemon=True)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    capsys.readouterr()
    assert main(command(runs, "byte_lm", work, *words)) == 130
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    captured = capsys.readouterr()
    step = max(losses(work))
    assert f"interrupted: step {step} is saved; the same command resumes" in captured.err
    assert step < 1000 and newest_progress(work)["step"] == step
    assert set(newest_progress(work)["sources"]) == {"text"}
    assert "config.json is truncated" in captured.out and "checkpoint of step 12" in captured.out
    assert read_run_config(work).optimizer.steps == 3000
    assert "its content was not compared" in captured.out
    assert (
        "changed: optimizer.steps: 12 -> 3000: the learning rate after step 12 is 0.003 on the"
        " new schedule (cosine to step 3000), was 0 on the old one"
    ) in captured.out
    assert not json.loads((work / "goodput.json").read_text())["seconds"]["restarts"]


def test_ctrl_c_before_the_first_step_says_what_there_is(runs, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bltjax.training.setup.training_sources", interrupted)
    assert main(command(runs, "byte_lm", tmp_path)) == 130
    assert "nothing is saved yet; the same command starts again" in capsys.readouterr().err
    assert main(command(runs, "byte_lm", runs.byte_lm)) == 130
    expected = "interrupted: step 12 is the last one saved; the same command resumes from there"
    assert expected in capsys.readouterr().err


def test_notices(runs, capfd):
    notice = Notice(make_mesh(read_run_config(runs.byte_lm).mesh))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with notice:
        assert int(notice.asked()) == 0
        with pytest.raises(KeyboardInterrupt):  # a step has yet to end
            signal.raise_signal(signal.SIGINT)
        notice.catch(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert int(notice.asked()) == TERMINATED
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert int(notice.asked()) == INTERRUPTED
        assert "saves after this step; Ctrl-C again ends it at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what is in the background
    try:
        with Notice(make_mesh(read_run_config(runs.byte_lm).mesh)) as notice:
            notice.catch(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handlers[1])


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("seed", 7, "seed: 0 -> 7"),
        ("optimizer.lr", 0.1, "optimizer.lr: 0.003 -> 0.1"),
        ("data.batch_size", 8, "data.batch_size: 4 -> 8"),
        ("optimizer.steps", 10, "optimizer.steps: 12 -> 10, but step 12 is done: give at least 12"),
        ("data.train.text.weight", 2.0, "data.train.text.weight: 1.0 -> 2.0"),
        ("latent_init.path", "llama", "latent_init.path: '' -> 'llama'"),
        ("patching.threshold", 1.0, "patching.threshold: 4.0 -> 1.0"),
    ],
)
def test_what_makes_it_another_run_is_refused(runs, path, value, line):
    run = read_run_config(runs.blt)
    with pytest.raises(ValueError) as raised:
        check_settings(run, replaced(run, path, value), "w", 12)
    refusal_lines = str(raised.value).splitlines()
    assert refusal_lines[0] == "w holds a run with another config (its value -> yours):"
    assert refusal_lines[1] == f"  {line}"
    assert "--init_from=w it has this one's weights, but neither" in refusal_lines[2]


def test_the_advice_after_bad_batches_is_true(runs):
    run = read_run_config(runs.byte_lm)
    for faults, advice, changed in (
        (FaultsConfig(), "--config.faults.bad_batch=skip resumes", ("bad_batch", "skip")),
        (
            FaultsConfig(bad_batch="skip", most_skips=4),
            "--config.faults.most_skips=8 resumes",
            ("most_skips", 8),
        ),
    ):
        manager = SimpleNamespace(wait_until_finished=lambda: None, latest_step=lambda: 12)
        text = last_good(manager, runs.byte_lm, faults)
        assert advice in text and f"--init_from={runs.byte_lm}" in text and "step 12" in text
        run = replaced(run, "faults", faults)
        check_settings(run, replaced(run, f"faults.{changed[0]}", changed[1]), "w", 12)
    manager.latest_step = lambda: None
    assert "the same --workdir takes any settings" in last_good(manager, runs.byte_lm, faults)


def test_another_model_can_not_begin_with_the_weights(runs):
    run = read_run_config(runs.blt)
    with pytest.raises(ValueError, match=r"(?s)blt.latent.layers.*another --workdir\.$"):
        check_settings(run, replaced(run, "blt.latent.layers", 3), "w", 12)


def test_sources_by_name_and_order(runs):
    run = read_run_config(runs.blt)
    source = run.data.train["text"]
    two = replaced(run, "data.train", {"text": source, "more": source})
    for old, new, path in (
        (run, two, "data.train.more: None -> {'path'"),
        (two, run, "data.train.more: {'path'"),
        (run, replaced(run, "data.train", {"other": source}), "data.train.other: None -> "),
        (two, replaced(run, "data.train", {"more": source, "text": source}), "data.train (order)"),
    ):
        with pytest.raises(ValueError, match="another config") as raised:
            check_settings(old, new, "w", 12)
        assert path in str(raised.value)
    check_settings(run, replaced(run, "data.eval", {"other": source}), "w", 12)


def test_a_run_may_become_longer_or_as_short_as_what_is_done(runs):
    run = read_run_config(runs.byte_lm)
    run = replaced(run, "optimizer", OptimizerConfig(steps=20, lr=2e-3, warmup_steps=0))
    assert setting_changes(run, replaced(run, "optimizer.steps", 40), 20) == [
        "optimizer.steps: 20 -> 40: the learning rate after step 20 is 0.001 on the new schedule"
        " (cosine to step 40), was 0 on the old one"
    ]
    for steps, refused in ((11, True), (12, False), (50, False)):
        assert bool(refusal(Change("optimizer.steps", 60, steps, "length"), 12)) == refused
    renamed = [Change("latent_init.path", *names, "renamed") for names in (("a", "b"), ("a", ""))]
    assert [bool(refusal(change, 1)) for change in renamed] == [False, True]


def test_content_of_sources(runs):
    run = read_run_config(runs.blt)
    moved = replaced(run, "data.train.text.path", "elsewhere")
    assert not check_sources(run, run, "w", {"text": "a"}, {"text": "a"})
    (line,) = check_sources(run, moved, "w", {"text": "a"}, {"text": "a"})
    assert line == "source 'text' has another name, and the same documents"
    (line,) = check_sources(run, moved, "w", {}, {"text": "a"})
    assert "not compared" in line
    for config, name in ((run, runs.root / "records" / "train"), (moved, "elsewhere")):
        with pytest.raises(ValueError) as raised:
            check_sources(run, config, "w", {"text": "a"}, {"text": "b"})
        assert f"source 'text' ({name}) doesn't hold the documents" in str(raised.value)
        assert ("-> 'elsewhere'" in str(raised.value)) == (config is moved)
        assert "--init_from=w" in str(raised.value)


def test_a_refused_config_leaves_nothing_behind(runs, tmp_path):
    work = copy_of(runs.byte_lm, tmp_path / "run")
    before = sorted(work.rglob("*"))
    with pytest.raises(ValueError, match="another config"):
        check_workdir(work, replaced(read_run_config(work), "optimizer.lr", 3.0))
    assert sorted(work.rglob("*")) == before


def test_data_that_changed_in_its_place_is_refused(runs, tmp_path, capsys):
    """As many documents as before, but one word of one differs."""
    text = (runs.root / "train.jsonl").read_text()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text.replace("patch", "catch", 1))
    words = command(runs, "byte_lm", runs.byte_lm, f"--config.data.train.text.path={changed}")
    before = newest_progress(runs.byte_lm)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "doesn't hold the documents that it had" in error and str(changed) in error
    assert newest_progress(runs.byte_lm) == before


def test_copies_of_a_byte_lm_and_a_tokenizer(runs, tmp_path, byte_level_tokenizer):
    run = read_run_config(runs.blt)
    byte_lm = entropy_model(run, runs.blt)
    assert not check_copies(run, run, runs.blt, byte_lm)
    same = replaced(run, "entropy_model", str(runs.blt / "byte_lm"))
    (line,) = check_copies(run, same, runs.blt, byte_lm)
    assert line.endswith("is the same as the run's own copy, which is used")
    other = byte_lm._replace(identity="0123")
    with pytest.raises(ValueError, match=rf"another one \({byte_lm.identity}\).* \(0123\)"):
        check_copies(run, same, runs.blt, other)

    bpe = dataclasses.replace(run.patching, mode="bpe", tokenizer="gone.json")
    run = replaced(run, "patching", bpe)
    shutil.copy(byte_level_tokenizer, tmp_path / "tokenizer.json")
    shutil.copy(byte_level_tokenizer, tmp_path / "same.json")
    (tmp_path / "other.json").write_text("{}")
    named = {
        name: replaced(run, "patching.tokenizer", str(tmp_path / f"{name}.json"))
        for name in ("same", "none", "other")
    }
    assert "is the same" in check_copies(run, named["same"], tmp_path, None)[0]
    assert "does not exist" in check_copies(run, named["none"], tmp_path, None)[0]
    with pytest.raises(ValueError, match=r"other.json is another one"):
        check_copies(run, named["other"], tmp_path, None)


def test_weights_to_begin_with_are_looked_at_first(runs, tmp_path):
    run = read_run_config(runs.byte_lm)
    begins = replaced(run, "init_from", str(runs.byte_lm))
    check_start(begins, tmp_path, resumes=False)
    with pytest.raises(ValueError, match="the work directory itself: leave it out to resume"):
        check_start(begins, runs.root / "records" / ".." / "byte_lm", resumes=True)
    for path, message in ((str(tmp_path), "neither"), (str(runs.blt), "holds a model with other")):
        with pytest.raises(ValueError, match=message):
            check_start(replaced(run, "init_from", path), tmp_path / "w", resumes=False)
    lean = replaced(begins, "byte_lm.remat", "full")
    check_start(lean, tmp_path, resumes=False)
    damaged = copy_of(runs.byte_lm, tmp_path / "damaged")
    for file in (damaged / "checkpoints" / "12" / "params").glob("*"):
        shutil.rmtree(file) if file.is_dir() else file.write_text("")
    with pytest.raises(ValueError, match="checkpoints/12/params can't be read"):
        check_start(replaced(run, "init_from", str(damaged)), tmp_path / "w", resumes=False)


def test_an_export_is_no_work_directory(runs, tmp_path):
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an export, with"):
        train(read_run_config(runs.byte_lm), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]


@pytest.mark.parametrize(
    ("settings", "devices", "advice"),
    [
        ({}, 3, "No mesh of 3 devices fits this config; one does with --config.data.batch_size=3"),
        (
            {"data.batch_size": 6},
            3,
            "--config.mesh.data=3 --config.mesh.fsdp=1 --config.mesh.tensor=1",
        ),
        ({"data.batch_size": 8}, 6, "one of 4 does as it is"),
        ({"mesh.fsdp": 2}, 8, "data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2"),
        ({}, 4, ""),
        ({"mesh.data": 3, "mesh.fsdp": 1, "data.batch_size": 6}, 3, ""),
    ],
)
def test_meshes_of_other_numbers_of_devices(runs, settings, devices, advice):
    config = read_run_config(runs.blt)
    for path, value in sorted(settings.items()):  # rows first, which meshes are checked against
        config = replaced(config, path, value)
    found = mesh_advice(config, jax.devices() * devices)
    assert advice in found and bool(advice) == bool(found)


def test_changes_are_structured():
    old, new = OptimizerConfig(), OptimizerConfig(steps=2000, lr=1.0)
    assert changes(old, new, "optimizer") == [
        Change("optimizer.steps", 1000, 2000, "length"),
        Change("optimizer.lr", 4e-4, 1.0, "fixed"),
    ]
