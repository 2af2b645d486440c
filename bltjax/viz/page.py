"""The page of a run: one HTML file with its figures, curves, config, samples and patches.

It is self-contained: no network, no script, pictures as inline SVG, and both colour schemes. It is
made from the files in the work directory, so it can be made during a run, on a machine without an
accelerator, or after the run. `train` writes it at its end; the `page` command adds samples from
the model (`samples.py`), which later pages keep.
"""

import dataclasses
from collections.abc import Sequence

from etils import epath

from bltjax.config.fields import from_dict, to_dict, within
from bltjax.config.rows import BYTE_ROWS
from bltjax.config.run import RunConfig
from bltjax.configured import measure_of, model_config, model_shapes, rows_of
from bltjax.families import family_of
from bltjax.model.loss import BITS_PER_BYTE, Measure, key_of
from bltjax.model.params import flattened, parameter_count
from bltjax.progress import duration, quantity
from bltjax.system.paths import path_of
from bltjax.system.storage import read_json, write_text
from bltjax.viz.chart import Line, chart, series
from bltjax.viz.html import render
from bltjax.weights import workdir as ckpt
from bltjax.weights.workdir import read_reports

LIMITS = BYTE_ROWS.limit_names
PAGE, SAMPLES = "page.html", "samples.json"


@dataclasses.dataclass(frozen=True)
class Text:
    """A sample: the beginning of a held-out document, and what the model wrote after it."""

    prompt: str
    written: str


@dataclasses.dataclass(frozen=True)
class SamplePatch:
    """A patch of a held-out text; the entropy of its first byte, if the model places patches so."""

    text: str
    bytes: int
    nats: float | None

    def __post_init__(self):
        within(self, "[1, 1e9]", "bytes")


@dataclasses.dataclass(frozen=True)
class Samples:
    """The contents of samples.json."""

    step: int
    temperature: float
    texts: tuple[Text, ...] = ()
    patches: tuple[SamplePatch, ...] = ()


def curves(
    reports: Sequence[dict], measure: Measure = BITS_PER_BYTE, limits: Sequence[str] = LIMITS
) -> str:
    """A chart for every curve that has reports. limits: what those of a row count."""

    def by_part(group: str) -> list[Line]:
        names = dict.fromkeys(key for report in reports for key in report)
        keys = [name for name in names if name.startswith(f"{group}/")]
        found = [Line(key.split("/")[1].replace("_", " "), series(reports, key)) for key in keys]
        return found

    def one(key: str, name: str = "") -> Line:
        return Line(name or key.replace("_", " "), series(reports, key))

    held_out = Line("held out", series(reports, f"held_out_{measure.key}"), marked=True)
    gradients = by_part("gradient_norms") or [one("gradient_norm")]
    figures = [
        chart(title_of(measure.name), [one(measure.key, "training"), held_out]),
        chart(title_of(measure.accuracy), [one(f"held_out_{key_of(measure.accuracy)}")])
        if measure.accuracy
        else "",
        chart("Learning rate", [one("learning_rate")], from_zero=True),
        chart("Gradient norm", gradients, from_zero=True),
        chart("Update norm", by_part("update_norms"), from_zero=True),
        chart("Bytes per second", [one("bytes_per_second")], from_zero=True),
        chart("Share of flops (MFU)", [one("mfu", "MFU")], from_zero=True),
        chart("Row fill", [one("byte_fill", limits[0]), one("patch_fill", limits[1])]),
        chart("Mean patch, bytes", [one("mean_patch_bytes")]),
    ]
    return "".join(figures)


def title_of(name: str) -> str:
    return name[0].upper() + name[1:]


def cards(config: RunConfig, reports: Sequence[dict]) -> dict[str, str]:
    """The main figures of the run, by name; those that it doesn't have are left out."""
    values = parameter_count(model_shapes(config), config.model)
    for report in reports:
        values |= report
    measure = measure_of(config)
    for _, value in series(reports, f"held_out_{measure.key}"):
        values["held_out"] = value
    forms = {
        f"held out, {measure.name}": ("held_out", "{:.4f}".format),
        f"training, {measure.name}": (measure.key, "{:.4f}".format),
        "parameters": ("total", quantity),
        "in hash tables": ("hash_tables", quantity),
        "step": ("step", lambda step: f"{step:,} of {config.optimizer.steps:,}"),
        "training since its last start": ("seconds", duration),
        "FLOP in training": ("training_flops", quantity),
        "bytes per second": ("bytes_per_second", quantity),
    }
    return {name: form(values[key]) for name, (key, form) in forms.items() if key in values}


def settings(config: RunConfig) -> dict[str, dict]:
    """The settings of each group, by name; last those that are in none."""
    values = to_dict(config)
    groups = {name: flattened(group) for name, group in values.items() if isinstance(group, dict)}
    single = {name: value for name, value in values.items() if name not in groups}
    return {name: group for name, group in groups.items() if group} | {"the run": single}


def samples_part(found: Samples) -> str:
    """Samples from the model, and the patches of a held-out text."""
    patches = []
    for piece in found.patches:
        hint = f"{piece.bytes} bytes"
        if piece.nats is not None:
            hint += f"; its first was unsure by {piece.nats:.2f} nats"
        patches.append((piece.text, hint))
    mean = sum(piece.bytes for piece in found.patches) / max(len(patches), 1)
    return render("samples.html", found=found, patches=patches, mean=f"{mean:.2f}")


def read_samples(path: epath.Path) -> Samples:
    """The contents of the file that `samples.write_samples` wrote.

    Raises:
      ValueError: naming the file, if it is anything else.
    """
    found = read_json(path)
    try:
        return from_dict(Samples, found)
    except ValueError:
        raise ValueError(f"{path} doesn't hold a run's samples") from None


def run_page(workdir: epath.Path) -> str:
    """The page of a run's work directory, as it is now.

    Raises:
      ValueError: for a folder that is no run.
    """
    config = ckpt.read_run_config(workdir)
    reports = read_reports(workdir / "metrics.jsonl")
    samples = ""
    if (workdir / SAMPLES).exists():
        try:
            samples = samples_part(read_samples(workdir / SAMPLES))
        except ValueError as error:
            print(f"{error}: the page has no samples; `page` writes others")
    return render(
        "run.html",
        kind=title_of(family_of(config).title),
        workdir=workdir,
        sources=", ".join(source.path for source in config.data.train.values()),
        cards=cards(config, reports),
        curves=curves(reports, measure_of(config), rows_of(model_config(config)).limit_names),
        samples=samples,
        settings=settings(config),
    )


def write_page(workdir: epath.Path) -> epath.Path:
    """Writes the page into the work directory; returns its path."""
    workdir = path_of(workdir)
    write_text(workdir / PAGE, run_page(workdir))
    return workdir / PAGE
