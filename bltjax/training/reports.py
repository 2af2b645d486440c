"""Reports of a run: a log line for people, JSONL and TensorBoard events for programs."""

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath

from bltjax.config.run import RunConfig
from bltjax.configured import measure_of, model_config, positions_of, rows_of
from bltjax.distributed.processes import is_primary
from bltjax.families import family_of
from bltjax.model.flops import utilisation
from bltjax.model.loss import BITS_PER_BYTE, Measure, Sums, key_of
from bltjax.progress import duration, quantity
from bltjax.system.paths import is_remote
from bltjax.system.storage import scratch, write_text
from bltjax.training.optimizer import learning_rate
from bltjax.weights.workdir import METRICS, whole_lines

UPLOAD_SECONDS = 60.0


class Reporter:
    """Writes reports of one run; on resume, drops the lines of steps that will be run again.

    One process of many writes. Objects in a bucket can't be appended to, so for a bucket the files
    are written on this machine, and copied every UPLOAD_SECONDS and at the end.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        self.writes = is_primary()
        if not self.writes:
            return
        self.workdir, self.folder, self.uploaded = workdir, Path(workdir), time.monotonic()
        if is_remote(workdir):
            self.folder = scratch() / "reports" / uuid.uuid4().hex
            (self.folder / "tensorboard").mkdir(parents=True)
            if (workdir / METRICS).exists():
                (self.folder / METRICS).write_bytes((workdir / METRICS).read_bytes())
        path = self.folder / METRICS
        if path.exists():
            lines = [line for line, report in whole_lines(path) if report["step"] <= first_step]
            write_text(path, "".join(line + "\n" for line in lines))
        self.file = path.open("a", encoding="utf-8")
        # It imports torch if installed, which takes two seconds: only training should pay for it.
        from tensorboardX import SummaryWriter

        self.events = SummaryWriter(
            str(self.folder / "tensorboard"),
            purge_step=first_step + 1,
            filename_suffix=f".{uuid.uuid4().hex[:8]}",  # default names are unique per second only
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        if time.monotonic() - self.uploaded > UPLOAD_SECONDS:
            self.events.flush()
            self.upload()

    def upload(self) -> None:
        """Copies the files to the bucket, if the run is in one."""
        self.uploaded = time.monotonic()
        if is_remote(self.workdir):
            for path in (self.folder / METRICS, *(self.folder / "tensorboard").iterdir()):
                target = self.workdir / str(path.relative_to(self.folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def close(self) -> None:
        if not self.writes:
            return
        self.file.close()
        self.events.close()
        self.upload()


class Reports:
    """The reports of a run, in the order of its steps."""

    def __init__(
        self,
        config: RunConfig,
        reporter: Reporter,
        flops: int,
        last_step: int,
        last_good: Callable[[], str],
        watch: Callable[[int, dict], None] | None = None,
    ):
        """flops: per step. last_good: the checkpoints left, for the error if a batch ends the run.
        watch: is called with each report's step and values, instead of printing a line."""
        self.config, self.reporter = config, reporter
        self.flops, self.last_step, self.last_good = flops, last_step, last_good
        self.watch = watch or self.print
        self.patched = model_config(config).patching is not None
        self.rows, self.measure = rows_of(model_config(config)), measure_of(config)
        self.rate_of = learning_rate(config.optimizer)
        self.window = Window(self.measure)
        self.values: dict[str, float] = {}
        self.warned = False

    def take(self, step: int, out: dict) -> int:
        """Fetches a step's report; prints and writes one every `log_every`.

        Returns the signal that some process has received (preemption.py), 0 for none.

        Raises:
          FloatingPointError: after a batch that the config doesn't tolerate.
        """
        out = jax.device_get(out)
        guard = out["guard"]
        if guard["in_a_row"]:
            self.pass_or_stop(step, out)
        else:
            self.window.add(out["sums"], out["fills"], out["text_bytes"])
        due = step % self.config.log_every == 0 or step == self.last_step
        if due and self.window.steps:
            with jax.transfer_guard("allow"):
                rate = float(self.rate_of(step - 1))
            self.values = self.window.flush()
            if not self.rows.of_windows:
                self.values["mean_patch_bytes"] = self.mean_patch()
            self.values |= {
                "bytes_per_second_per_chip": self.values["bytes_per_second"] / jax.device_count(),
                "gradient_norm": float(out["gradient_norm"]),
                "learning_rate": rate,
                "training_flops": float(self.flops) * step,
                "skipped_batches": int(guard["skipped"]),
            }
            reached = self.flops * self.values["steps_per_second"]
            self.values |= utilisation(reached, jax.devices())
            if self.patched:
                for name in ("gradient_norms", "update_norms"):
                    self.values |= {f"{name}/{x}": float(norm) for x, norm in out[name].items()}
            self.warn_of_idle_slots()
            self.reporter.write(step, self.values)
            self.watch(step, self.values)
        return int(out["notice"])

    def mean_patch(self) -> float:
        """Bytes per patch, slot or token; a byte LM's positions are its patches."""
        model, data = model_config(self.config), self.config.data
        used = self.values["patch_fill"] * positions_of(model)
        if family_of(model).rows == "tokens":
            per_step = self.values["bytes_per_second"] / self.values["steps_per_second"]
            return per_step / data.batch_size / used
        return self.values["byte_fill"] * data.seq_len / used

    def pass_or_stop(self, step: int, out: dict) -> None:
        """Logs a skipped batch, or raises."""
        faults, guard, sums = self.config.faults, out["guard"], out["sums"]
        message = (
            f"step {step}: loss {sums.nats / max(sums.weight, 1):.4g} (before: about"
            f" {guard['mean_loss']:.4g}), gradient norm {out['gradient_norm']:.4g}"
        )
        row = int(guard["in_a_row"])
        if faults.bad_batch == "skip" and row <= faults.most_skips:
            print(f"{message}: batch skipped, {row} in a row, {int(guard['skipped'])} in total")
            return
        limit = f" Skipped {row - 1} in a row before." if row > 1 else ""
        raise FloatingPointError(f"{message}.{limit} {self.last_good()}")

    def warn_of_idle_slots(self) -> None:
        values, data = self.values, self.config.data
        fullest = min(values["byte_fill"], values["patch_fill"])
        if self.warned or not self.patched or fullest >= 0.9:
            return
        self.warned = True
        used = values["mean_patch_bytes"]
        by_threshold = self.rows.patching is not None and self.rows.patching.mode == "entropy"
        advice = "Calibrate the threshold, or change" if by_threshold else "Change"
        print(
            f"warning: rows are {values['byte_fill']:.0%} full of bytes and"
            f" {values['patch_fill']:.0%} of patches, because patches average {used:.2f} bytes"
            f" and a row has {data.seq_len / data.max_patches:.2f} bytes for each. {advice}"
            " data.max_patches."
        )

    def print(self, step: int, values: dict[str, float]) -> None:
        steps = self.config.optimizer.steps
        measure, names = self.measure, self.rows.limit_names
        if "loss" not in values:
            print(f"step {step}/{steps}  held out {held_out_words(measure, values)}", flush=True)
            return
        left = (steps - step) / max(values["steps_per_second"], 1e-9)
        print(
            f"step {step}/{steps}  loss {values['loss']:.4f}"
            f"  {values[measure.key]:.3f} {measure.unit}"
            f"  {quantity(values['bytes_per_second'])}B/s"
            f"  fill {values['byte_fill']:.1%} of {names[0]}"
            f" {values['patch_fill']:.1%} of {names[1]}"
            + (f"  mfu {values['mfu']:.1%}" if "mfu" in values else "")
            + f"  {duration(left)} left",
            flush=True,
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time is excluded from the rates."""
        started_at = time.monotonic()
        yield
        self.window.since += time.monotonic() - started_at

    def held_out(self, step: int, sums: Sums) -> None:
        """Records held-out bits per byte, or what the family measures."""
        values = {f"held_out_{name}": x for name, x in self.measure.values(sums).items()}
        self.reporter.write(step, values)
        self.values |= values
        self.watch(step, values)


def held_out_words(measure: Measure, values: dict[str, float], digits: int = 4) -> str:
    """A held-out report in words."""
    words = f"{values[f'held_out_{measure.key}']:.{digits}f} {measure.unit}"
    if measure.accuracy:
        words += f", {measure.accuracy} {values[f'held_out_{key_of(measure.accuracy)}']:.1%}"
    return words


class Window:
    """Sums since the last report, and their time."""

    def __init__(self, measure: Measure = BITS_PER_BYTE):
        self.measure = measure
        self.started_at = time.monotonic()
        self.clear()

    def clear(self) -> None:
        self.since = time.monotonic()
        self.sums, self.filled, self.text_bytes, self.steps = np.zeros(4), np.zeros(2), 0.0, 0

    def add(self, sums: Sums, filled: tuple[float, float], text_bytes: float) -> None:
        self.sums += np.array([float(x) for x in sums[:4]])
        self.filled += np.array(filled)
        self.text_bytes += float(text_bytes)
        self.steps += 1

    def flush(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self.since, 1e-9)
        sums = Sums(*self.sums)
        byte_fill, patch_fill = self.filled / self.steps
        values = {
            "loss": sums.nats / max(sums.weight, 1.0),
            self.measure.key: self.measure.bits(sums),
            "bytes_per_second": self.text_bytes / elapsed,
            "steps_per_second": self.steps / elapsed,
            "byte_fill": byte_fill,
            "patch_fill": patch_fill,
            "seconds": time.monotonic() - self.started_at,
        }
        self.clear()
        return {name: float(value) for name, value in values.items()}
