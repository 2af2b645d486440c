"""The trainer: resumed equals straight, with real processes killed; bad runs stop with the
reason."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batch import random_batch

from bltjax.__main__ import main
from bltjax.configured import initial_params, load_config, model_config, module_of, resolved
from bltjax.training.goodput import Profile
from bltjax.training.step import TrainState, make_train_step, run_optimizer
from bltjax.weights.export import load_params

ROOT = Path(__file__).parents[2]
TINY = "tests/tiny.py"


def command(runs, model, workdir, *more):
    part = runs.root / "records" if model == "blt" else runs.root
    suffix = "" if model == "blt" else ".jsonl"
    settings = runs.blt_settings if model == "blt" else ()
    return [
        "train",
        f"--config={TINY}:{model}",
        f"--workdir={workdir}",
        f"--config.data.train.text.path={part}/train{suffix}",
        f"--config.data.eval.text.path={part}/held_out{suffix}",
        *settings,
        *more,
    ]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_the_loss_falls_and_everything_is_reported(runs):
    for workdir in (runs.byte_lm, runs.blt):
        found = losses(workdir)
        assert sorted(found) == list(range(1, 13)) and found[12] < found[1] - 0.3
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines if "held_out_bits_per_byte" in line} == {6, 12}
        assert list((workdir / "tensorboard").iterdir())
    parts = {"encoder", "latent", "decoder", "hash_tables"}
    for line in (line for line in lines if "loss" in line):
        for name in ("gradient_norms", "update_norms"):
            assert all(line[f"{name}/{part}"] > 0 for part in parts)
        squares = sum(line[f"gradient_norms/{part}"] ** 2 for part in parts)
        assert squares == pytest.approx(line["gradient_norm"] ** 2, rel=1e-5)
        assert 1 <= line["mean_patch_bytes"] < 12 and line["bytes_per_second_per_chip"] > 0
    tables = load_params(runs.blt)[1]["encoder"]["ngrams_RME"]
    assert not np.asarray(tables)[:, 300:].any(), "rows that only pad a table stay zero"
    assert load_params(runs.blt).step == 12
    assert load_params(runs.blt / "byte_lm").config.model.group == "byte_lm"


def test_a_window_of_steps_is_traced(runs, tmp_path, capsys):
    assert main(command(runs, "byte_lm", tmp_path, "--profile=2:3", "--stop_at=4")) == 0
    assert f"trace of steps 2 to 3: xprof --logdir={tmp_path}/profile" in capsys.readouterr().out
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"jit_step" in trace.read_bytes()
    (events,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
    marked = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert marked == ["2", "3"]
    assert sum(event.get("name") == "input" for event in events) == 2
    assert not [event for event in events if event.get("name", "").startswith("$")]
    # Steps that a start can't trace are skipped, or logged: its first step, and earlier ones.
    for window, message in (
        ("5:6", "trace of steps 6 to 6"),
        ("7:7", "no trace: this start had none"),
    ):
        words = (f"--profile={window}", f"--stop_at={int(window[-1])}")
        assert main(command(runs, "byte_lm", tmp_path, *words)) == 0
        assert message in capsys.readouterr().out
    assert main(command(runs, "byte_lm", tmp_path, "--profile=3:2")) == 1
    assert "--profile is '3:2', not START:STOP" in capsys.readouterr().err


def test_a_trace_outlives_a_step_that_fails(tmp_path, capsys):
    """The trace is needed most then; the failure itself is raised wherever it is first met."""

    class Broken:
        def block_until_ready(self):
            raise RuntimeError("a collective was broken off")

    profile = Profile("2:5", tmp_path)
    for step in profile.steps(range(1, 9)):
        profile.dispatched(Broken() if step == 3 else jnp.zeros(()))
        if step == 3:
            break
    profile.close()
    assert "trace of steps 2 to 3" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("model", ["byte_lm", pytest.param("blt", marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_straight(runs, tmp_path, model, seed):
    """kill -9 at a random step; the same command then gives the losses of an uninterrupted run."""
    kill_after = 4 + seed % 6
    print(f"killed once step {kill_after} is reported")
    words = command(runs, model, tmp_path / "run")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bltjax", *words],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith(f"step {kill_after}/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-m", "bltjax", *words], cwd=ROOT, env=environment, check=True)
    assert losses(tmp_path / "run") == losses(runs.blt if model == "blt" else runs.byte_lm)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["factored", "bfloat16"])
def test_small_moments_train_and_resume(runs, tmp_path, kind):
    words = [f"--config.optimizer.table_moments={kind}"]
    for folder, stops in (("straight", (8,)), ("resumed", (4, 8))):
        for stop in stops:
            assert main(command(runs, "blt", tmp_path / folder, *words, f"--stop_at={stop}")) == 0
    found = losses(tmp_path / "straight")
    assert losses(tmp_path / "resumed") == found and found[8] < found[1] - 0.2


def test_another_config_is_refused_with_the_difference(runs, capsys):
    assert main(command(runs, "byte_lm", runs.byte_lm, "--config.optimizer.lr=0.1")) == 1
    error = capsys.readouterr().err
    assert "optimizer.lr: 0.003 -> 0.1" in error and "another --workdir" in error
    assert "Traceback" not in error


def test_not_a_number_stops_with_step_and_checkpoint(runs, tmp_path, capsys):
    words = command(runs, "byte_lm", tmp_path, "--config.optimizer.lr=1e38")
    assert main([*words, "--config.optimizer.warmup_steps=0"]) == 1
    error = capsys.readouterr().err
    assert "step 2: loss" in error and "Last good checkpoint: none" in error


def test_rows_far_from_the_threshold_are_warned_of(runs, tmp_path, capsys):
    words = command(runs, "blt", tmp_path, "--config.patching.threshold=0", "--stop_at=1")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "% full of bytes and 100% of patches" in printed and "warning" in printed
    assert "bytes for each. Calibrate" in printed


def test_entropies_of_another_byte_lm_are_refused(runs, tmp_path, capsys):
    assert main(command(runs, "byte_lm", tmp_path / "lm", "--config.seed=9", "--stop_at=1")) == 0
    words = command(runs, "blt", tmp_path / "run", f"--config.entropy_model={tmp_path / 'lm'}")
    assert main(words) == 1
    assert "but the requested byte LM is" in capsys.readouterr().err


def test_unwritable_workdir(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(runs, "byte_lm", tmp_path / "file" / "run")) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "Traceback" not in error


def test_accumulation_equals_one_batch():
    results = []
    for count in (1, 2):
        paths = ["data.train.text.path=x", "data.eval.text.path=x"]
        config = load_config(f"{TINY}:blt", [f"optimizer.grad_accum_steps={count}", *paths])
        config = resolved(config, jax.devices()[0])
        model, optimizer = module_of(model_config(config)), run_optimizer(config)
        params = jax.jit(lambda key: initial_params(model.config, key))(jax.random.key(0))  # noqa: B023
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        batch = random_batch(config.data, np.random.default_rng(0))
        _, report = jax.jit(make_train_step(config, model, optimizer))(state, batch)
        results.append(jax.tree.map(float, (report["sums"].loss, report["gradient_norm"])))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one(runs, tmp_path):
    """A forced mesh of 2 x 2 x 2 gives the losses of one device."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    words = command(runs, "blt", tmp_path / "run", *mesh, "--stop_at=3")
    subprocess.run([sys.executable, "-m", "bltjax", *words], cwd=ROOT, env=environment, check=True)
    straight = losses(runs.blt)
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(straight[step], abs=1e-5)
