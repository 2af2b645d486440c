"""The page of a run: one HTML file with its figures, curves, config, samples and patches.

It is self-contained: no network, no script, pictures as inline SVG, and both colour schemes. It is
made from the files in the work directory, so it can be made during a run, on a machine without an
accelerator, or after the run. `train` writes it at its end; the `page` command adds samples from
the model (`samples.py`), which later pages keep.
"""

import html
from collections.abc import Iterator, Sequence

from etils import epath

from bltjax.config.fields import to_dict
from bltjax.config.run import RunConfig
from bltjax.families import family_of, model_shapes
from bltjax.model.params import flattened, parameter_count
from bltjax.progress import duration, quantity
from bltjax.system.paths import path_of
from bltjax.system.storage import read_json, write_text
from bltjax.viz.chart import Line, chart, series
from bltjax.weights import workdir as ckpt
from bltjax.weights.workdir import read_reports

PAGE, SAMPLES = "page.html", "samples.json"
STYLE = """
:root{--ink:#1c2733;--soft:#5c6b7a;--line:#dde3e9;--paper:#fff;--card:#f6f8fa;
--c0:#2767c4;--c1:#d9641e;--c2:#2a8c55;--c3:#9a49b8}
@media(prefers-color-scheme:dark){:root{--ink:#e4eaf0;--soft:#9aa8b6;--line:#34404d;--paper:#12181f;
--card:#1b232c;--c0:#6aa5f5;--c1:#f59a55;--c2:#5cc48b;--c3:#c98be0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1040px;padding:1.5rem 1rem 4rem;background:var(--paper);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
p{margin:.3rem 0}.soft{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(max(140px,22%),1fr));gap:.7rem;
margin:1.2rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.card b{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.85rem}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));
gap:1.2rem 1.6rem}
figure{margin:0}figcaption{font-weight:600;font-size:.95rem}
figcaption span{font-weight:400;margin-left:.7em;white-space:nowrap}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;font-family:inherit}
.grid{stroke:var(--line)}.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.text{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,"Noto Sans Mono CJK SC",monospace;
font-size:.9rem;line-height:1.75;white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);
border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem;margin:.5rem 0 1rem}
.prompt{color:var(--soft)}
.text i{font-style:normal;color:#111;border-radius:.2em;padding:.08em 0}
details{border-top:1px solid var(--line)}details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:.45rem 0;font-weight:600}
table{border-collapse:collapse;margin:0 0 .8rem}
td{padding:.1rem 1.4rem .1rem 0;vertical-align:top;overflow-wrap:anywhere}
td:first-child{color:var(--soft)}
"""
PATCH_COLOURS = ("#aecbfa", "#fdd9a5", "#a8dab5", "#f5b7c5", "#d3c4f3", "#fdf1a3")


def curves(reports: Sequence[dict]) -> str:
    """A chart for every curve that has reports."""

    def by_part(group: str) -> list[Line]:
        names = dict.fromkeys(key for report in reports for key in report)
        keys = [name for name in names if name.startswith(f"{group}/")]
        found = [Line(key.split("/")[1].replace("_", " "), series(reports, key)) for key in keys]
        return found

    def one(key: str, name: str = "") -> Line:
        return Line(name or key.replace("_", " "), series(reports, key))

    held_out = Line("held out", series(reports, "held_out_bits_per_byte"), marked=True)
    gradients = by_part("gradient_norms") or [one("gradient_norm")]
    figures = [
        chart("Bits per byte", [one("bits_per_byte", "training"), held_out]),
        chart("Learning rate", [one("learning_rate")], from_zero=True),
        chart("Gradient norm", gradients, from_zero=True),
        chart("Update norm", by_part("update_norms"), from_zero=True),
        chart("Bytes per second", [one("bytes_per_second")], from_zero=True),
        chart("Share of flops (MFU)", [one("mfu", "MFU")], from_zero=True),
        chart("Row fill", [one("byte_fill", "bytes"), one("patch_fill", "patches")]),
        chart("Mean patch, bytes", [one("mean_patch_bytes")]),
    ]
    return "".join(figures)


def cards(config: RunConfig, reports: Sequence[dict]) -> str:
    """The main figures of the run."""
    last: dict = {}
    for report in reports:
        last |= report
    held_out = series(reports, "held_out_bits_per_byte")
    counts = parameter_count(model_shapes(config), config.model)
    found = [
        ("held out, bits per byte", f"{held_out[-1][1]:.4f}" if held_out else None),
        ("training, bits per byte", f"{last['bits_per_byte']:.4f}" if "loss" in last else None),
        ("parameters", quantity(counts["total"])),
        ("in hash tables", quantity(counts["hash_tables"]) if "hash_tables" in counts else None),
        ("step", f"{last['step']:,} of {config.optimizer.steps:,}" if last else None),
        ("training since its last start", duration(last["seconds"]) if "seconds" in last else None),
        (
            "FLOP in training",
            quantity(last["training_flops"]) if "training_flops" in last else None,
        ),
        ("bytes per second", quantity(last["bytes_per_second"]) if "loss" in last else None),
    ]
    return "".join(
        f'<div class="card"><b>{value}</b><span>{name}</span></div>'
        for name, value in found
        if value
    )


def settings(config: RunConfig) -> Iterator[str]:
    """A fold for each group of settings."""
    single = {}
    for group, values in to_dict(config).items():
        if not isinstance(values, dict):
            single[group] = values
        elif values:
            yield f"<details><summary>{html.escape(group)}</summary>{table(values)}</details>"
    yield f"<details><summary>the run</summary>{table(single)}</details>"


def table(values: dict) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(path.replace('/', '.'))}</td><td>{html.escape(str(value))}</td></tr>"
        for path, value in flattened(values).items()
        if value not in (None, "")
    )
    return f"<table>{rows}</table>"


def samples_part(found: dict) -> str:
    """Samples from the model, and the patches of a held-out text."""
    parts = []
    if found.get("patches"):
        pieces = []
        for number, piece in enumerate(found["patches"]):
            colour = PATCH_COLOURS[number % len(PATCH_COLOURS)]
            hint = f"{piece['bytes']} bytes"
            if piece["nats"] is not None:
                hint += f"; its first was unsure by {piece['nats']:.2f} nats"
            body = html.escape(piece["text"])
            pieces.append(f'<i style="background:{colour}" title="{hint}">{body}</i>')
        mean = sum(piece["bytes"] for piece in found["patches"]) / len(found["patches"])
        parts.append(
            f"<h2>Patches of a held-out text</h2><p class=soft>{len(found['patches'])} patches,"
            f' {mean:.2f} bytes on average</p><div class="text">{"".join(pieces)}</div>'
        )
    if found.get("texts"):
        parts.append(
            f"<h2>Samples</h2><p class=soft>at step {found['step']:,}, temperature"
            f" {found['temperature']}; the prompts are held out</p>"
        )
    for text in found.get("texts", ()):
        prompt, written = html.escape(text["prompt"]), html.escape(text["written"])
        parts.append(f'<div class="text"><span class="prompt">{prompt}</span>{written}</div>')
    return "".join(parts)


def read_samples(path: epath.Path) -> dict:
    """The contents of the file that `samples.write_samples` wrote.

    Raises:
      ValueError: naming the file, if it is anything else.
    """
    found = read_json(path)
    try:
        samples_part(found)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{path} doesn't hold a run's samples") from None
    return found


def run_page(workdir: epath.Path) -> str:
    """The page of a run's work directory, as it is now.

    Raises:
      ValueError: for a folder that is no run.
    """
    config = ckpt.read_config(workdir)
    reports = read_reports(workdir / "metrics.jsonl")
    kind = family_of(config).title
    kind = kind[0].upper() + kind[1:]
    title = html.escape(f"{kind} in {workdir}")
    sources = ", ".join(source.path for source in config.data.train.values())
    samples = {}
    if (workdir / SAMPLES).exists():
        try:
            samples = read_samples(workdir / SAMPLES)
        except ValueError as error:
            print(f"{error}: the page has no samples; `page` writes others")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{kind}</h1>"
        f'<p class="soft">{html.escape(str(workdir))}, trained on {html.escape(sources)}</p>'
        f'<div class="cards">{cards(config, reports)}</div>'
        f'<h2>Curves</h2><div class="curves">{curves(reports)}</div>{samples_part(samples)}'
        f"<h2>Config</h2>{''.join(settings(config))}</body></html>\n"
    )


def write_page(workdir: epath.Path) -> epath.Path:
    """Writes the page into the work directory; returns its path."""
    workdir = path_of(workdir)
    write_text(workdir / PAGE, run_page(workdir))
    return workdir / PAGE
