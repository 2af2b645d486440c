"""A training run as a Python object: train it here, then look at it."""

import functools
import logging
from pathlib import Path

from tqdm.auto import tqdm

from bltjax.config.run import RunConfig
from bltjax.configured import measure_of
from bltjax.distributed.coordinator import process_count
from bltjax.distributed.processes import is_primary
from bltjax.inference.loaded import LoadedModel, load
from bltjax.system.compiling import keep_programs
from bltjax.system.environment import keep_buffers
from bltjax.system.paths import path_of
from bltjax.training.reports import held_out_words
from bltjax.training.train import train
from bltjax.viz.page import write_page
from bltjax.weights.workdir import METRICS, read_reports, read_run_config, saved_steps

LOGGER = logging.getLogger(__name__)


class Run:
    """A run's work directory, trained or still in training.

    losses: [(step, nats per weighted target)] of its reports. evaluations: [(step, held-out bits
    per byte)], or what the family measures instead. model: the newest checkpoint, as a LoadedModel.
    """

    def __init__(self, workdir):
        self.workdir = path_of(workdir)

    def values(self, name: str) -> list[tuple[int, float]]:
        """[(step, value)] of a figure that the run reported, such as "gradient_norm"."""
        reports = read_reports(self.workdir / METRICS)
        return [(report["step"], report[name]) for report in reports if name in report]

    @property
    def losses(self) -> list[tuple[int, float]]:
        return self.values("loss")

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        measure = measure_of(read_run_config(self.workdir))
        return self.values(f"held_out_{measure.key}")

    @functools.cached_property
    def model(self) -> LoadedModel:
        return load(self.workdir)

    def page(self) -> Path:
        """Writes the run's page, one HTML file with its curves and settings."""
        return write_page(self.workdir)

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r})"


def train_run(config: RunConfig, workdir, *, resume: bool = True) -> Run:
    """As `bltjax.train`; as fast as the command, by the same settings of the process."""
    workdir = path_of(workdir)
    steps = saved_steps(workdir)
    if steps and not resume:
        raise ValueError(
            f"{workdir} has a run, saved at step {steps[-1]}: resume it, or give another workdir"
        )
    keep_buffers()
    if process_count() == 1 and (reason := keep_programs()):
        LOGGER.warning("compiled programs are not cached: %s", reason)
    total = config.optimizer.steps
    initial, measure = steps[-1] if steps else 0, measure_of(config)
    with tqdm(total=total, unit="step", initial=initial, disable=not is_primary()) as bar:

        def watch(step: int, values: dict) -> None:
            if f"held_out_{measure.key}" in values:
                shown = f"held out {held_out_words(measure, values, digits=3)}"
            else:
                shown = f"{values[measure.key]:.3f} {measure.unit}"
            bar.set_postfix_str(shown, refresh=False)  # with the step that it is of
            bar.update(step - bar.n)

        train(config, workdir, watch=watch)
    return Run(workdir)
