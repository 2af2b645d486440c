"""One trainer for the byte LM, the byte CNN and BLT, read from top to bottom.

The loop dispatches step n and only then fetches the report of step n - 1, so the host never stalls
the device. A checkpoint holds the state, the data streams and the step together; running the same
command again resumes from the newest one, and its losses are those of a run never interrupted.
"""

import argparse
import contextlib
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from bltjax import checkpoint as ckpt
from bltjax.config import BLTConfig, ByteCNNConfig, ByteLMConfig, RunConfig, to_dict
from bltjax.config_file import load_config
from bltjax.data.pipeline import fills, held_out_batches, training_batches
from bltjax.export import TOKENIZER
from bltjax.flops import training_flops, utilisation
from bltjax.metrics import Reporter, duration, quantity
from bltjax.model import parameter_count
from bltjax.objective import Sums
from bltjax.optimizer import learning_rate
from bltjax.scoring import scored_source
from bltjax.sharding import make_mesh, row_sharding
from bltjax.start import check_start, entropy_model, placed_patches, started
from bltjax.training_step import compute_dtype, step_parts

KINDS = {BLTConfig: "BLT", ByteLMConfig: "byte LM", ByteCNNConfig: "byte CNN"}


def held_out_bits(scores, params, batches, sharding) -> float:
    total = [0.0, 0.0]
    for batch in batches:
        sums = jax.device_get(scores(params, jax.device_put(batch, sharding)))
        total[0] += float(sums.text_nats)
        total[1] += float(sums.text_bytes)
    return total[0] / np.log(2.0) / max(total[1], 1.0)


def train(config: RunConfig, workdir: Path, *, stop_at: int | None = None) -> dict[str, float]:
    """Trains to `optimizer.steps` (or until `stop_at`), resuming what is there; the last report.

    Raises:
      ValueError: for a work directory of another run, or data that the config cannot use.
      FloatingPointError: at the first step whose loss or gradient is not finite.
    """
    begun = time.monotonic()
    ckpt.check_workdir(workdir, config)
    if not ckpt.saved_steps(workdir):
        check_start(config)
    byte_lm = entropy_model(config, workdir)
    mesh = make_mesh(config.mesh)
    parts = step_parts(config, mesh)
    rows = row_sharding(mesh)
    patching = placed_patches(config, workdir)
    expected = byte_lm.identity if byte_lm else None

    dataset = training_batches(
        config.data,
        patching,
        seed=config.seed,
        expected_identity=expected,
        streams=range(config.data.rows),
    )
    batches = iter(dataset)
    held_out = []
    for name, source in config.data.held_out.items():
        documents = scored_source(source, patching, byte_lm, skip_bad=config.data.skip_bad)
        found, found_cuts = held_out_batches(documents, config.data, patching)
        held_out += found
        if found_cuts:
            print(f"held-out {name}: {found_cuts} cuts in documents longer than a row")

    counts = parameter_count(parts.shapes.params, config.model)
    flops = training_flops(
        config.model, config.data.rows, config.data.row_bytes, config.data.row_patches
    )
    print(
        f"{KINDS[type(config.model)]}: {quantity(counts['total'])} parameters ("
        + ", ".join(f"{part} {quantity(n)}" for part, n in counts.items() if part != "total")
        + f"); {quantity(flops)}FLOP a step; mesh {dict(mesh.shape)}; {compute_dtype(config).name}"
    )

    # The data is there and the settings hold: from here on the directory is this run's.
    if not ckpt.saved_steps(workdir):
        ckpt.write_config(workdir, config)
        if byte_lm:
            ckpt.save_params(workdir / "byte_lm", byte_lm.run, byte_lm.params, 0)
        if config.blt and config.patching.mode == "bpe":
            shutil.copyfile(config.patching.tokenizer, workdir / TOKENIZER)
    manager = ckpt.make_manager(workdir, config)
    if manager.latest_step() is None:
        key = jax.random.key(config.seed)
        state = jax.jit(parts.initial_state, out_shardings=parts.shardings)(key)
        state = state._replace(params=started(config, state.params, parts.shardings.params))
        first = 0
    else:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            parts.shapes,
            parts.shardings,
        )
        state, progress = ckpt.restore(manager, workdir, target)
        first = progress["step"]
        batches.set_state(progress["streams"])
        print(f"resumed {workdir} after step {first}")
    reporter = Reporter(workdir, first)
    rate_of = learning_rate(config.optimizer)
    last_step = min(config.optimizer.steps, stop_at or config.optimizer.steps)
    window = Window(begun)
    # A byte LM's positions are its patches.
    patch_slots = config.data.row_patches if config.blt else config.data.row_bytes
    values: dict[str, float] = {}
    warned = False

    def report(step: int, out, filled) -> None:
        """Fetches a step's report; prints and writes one every `log_every`."""
        nonlocal values, warned
        sums, norm = jax.device_get((out["sums"], out["gradient_norm"]))
        if not (np.isfinite(sums.nats) and np.isfinite(norm)):
            manager.wait_until_finished()
            good = manager.latest_step()
            raise FloatingPointError(
                f"step {step}: loss {sums.nats / max(sums.weight, 1):.4g}, gradient norm"
                f" {norm:.4g}."
                f" Last good checkpoint: {'none' if good is None else f'step {good}'} in"
                f" {workdir / 'checkpoints'}.\nA lower --config.optimizer.lr or a longer"
                " warm-up usually helps; a changed config needs another --workdir."
            )
        window.add(sums, filled)
        if step % config.log_every and step != last_step:
            return
        with jax.transfer_guard("allow"):
            rate = float(rate_of(step - 1))
        values = window.flush() | {
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "training_flops": float(flops) * step,
        }
        values |= utilisation(flops * values["steps_per_second"], list(mesh.devices.flat))
        if not warned and config.blt and min(values["byte_fill"], values["patch_fill"]) < 0.9:
            warned = True
            data = config.data
            used = values["byte_fill"] * data.row_bytes / (values["patch_fill"] * data.row_patches)
            print(
                f"warning: rows are {values['byte_fill']:.0%} full of bytes and"
                f" {values['patch_fill']:.0%} of patches, because patches average {used:.2f} bytes"
                f" and a row has {data.row_bytes / data.row_patches:.2f} bytes for each. Calibrate"
                " the threshold, or change data.row_patches."
            )
        reporter.write(step, values)
        left = (config.optimizer.steps - step) / max(values["steps_per_second"], 1e-9)
        print(
            f"step {step}/{config.optimizer.steps}  loss {values['loss']:.4f}"
            f"  {values['bits_per_byte']:.3f} bits/byte  {quantity(values['bytes_per_second'])}B/s"
            f"  fill {values['byte_fill']:.1%} of bytes {values['patch_fill']:.1%} of patches"
            + (f"  mfu {values['mfu']:.1%}" if "mfu" in values else "")
            + f"  {duration(left)} left",
            flush=True,
        )

    with contextlib.ExitStack() as exits:
        exits.callback(batches.close)
        exits.callback(reporter.close)
        exits.callback(manager.close)  # waits for a checkpoint that is being written
        exits.enter_context(jax.set_mesh(mesh))  # by which kernels are split among devices
        # A transfer that nobody asked for would stall every step; it is an error here.
        exits.enter_context(jax.transfer_guard("disallow"))
        pending = None
        for step in range(first + 1, last_step + 1):
            batch = next(batches)
            state, out = parts.step(state, jax.device_put(batch, rows))
            if pending is not None:
                report(*pending)
            pending = (step, out, fills(batch, patch_slots))
            at_end = step == last_step
            evaluates = bool(held_out) and (step % config.evaluate_every == 0 or at_end)
            saves = step % config.checkpoint.every == 0 or at_end
            if evaluates or saves:
                report(*pending)  # nothing that is not finite may reach a checkpoint
                pending = None
            if evaluates:
                paused = time.monotonic()
                bits = held_out_bits(parts.scores, state.params, held_out, rows)
                reporter.write(step, {"held_out_bits_per_byte": bits})
                print(
                    f"step {step}/{config.optimizer.steps}  held out {bits:.4f} bits/byte",
                    flush=True,
                )
                values["held_out_bits_per_byte"] = bits
                window.pause(time.monotonic() - paused)
            if saves:
                progress = {
                    "step": step,
                    "streams": batches.get_state(),
                    "config": to_dict(config),
                    "held_out_bits_per_byte": values.get("held_out_bits_per_byte"),
                }
                ckpt.save(manager, state, progress)
    return values


class Window:
    """Sums since the last report, and the time that they took."""

    def __init__(self, begun: float):
        self.begun = begun
        self.clear()

    def clear(self) -> None:
        self.since = time.monotonic()
        self.sums, self.filled, self.steps = np.zeros(4), np.zeros(2), 0

    def add(self, sums: Sums, filled: tuple[float, float]) -> None:
        self.sums += np.array([float(x) for x in sums])
        self.filled += np.array(filled)
        self.steps += 1

    def pause(self, seconds: float) -> None:
        """Leaves out time that was not spent in steps."""
        self.since += seconds

    def flush(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self.since, 1e-9)
        sums = Sums(*self.sums)
        byte_fill, patch_fill = self.filled / self.steps
        values = {
            "loss": sums.nats / max(sums.weight, 1.0),
            "bits_per_byte": sums.text_nats / np.log(2.0) / max(sums.text_bytes, 1.0),
            "bytes_per_second": sums.text_bytes / elapsed,
            "steps_per_second": self.steps / elapsed,
            "byte_fill": byte_fill,
            "patch_fill": patch_fill,
            "seconds": time.monotonic() - self.begun,
        }
        self.clear()
        return {name: float(value) for name, value in values.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, help="configs/FILE.py or configs/FILE.py:ARGUMENT"
    )
    parser.add_argument("--workdir", required=True, type=Path, help="where the run lives")
    parser.add_argument("--stop_at", type=int, help="stop after this step, as if interrupted")
    parser.add_argument("--init_from", help="run or export whose parameters training begins with")
    parser.add_argument(
        "--init_latent_from",
        help="folder of Llama 3 safetensors that the latent transformer begins as; see the"
        " settings of config.latent_init",
    )


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.init_from:
        overrides = [*overrides, f"init_from={args.init_from}"]
    if args.init_latent_from:
        overrides = [*overrides, f"latent_init.path={args.init_latent_from}"]
    config = load_config(args.config, overrides)
    train(config, args.workdir, stop_at=args.stop_at)
    print(f"finished; the run is in {args.workdir}")
