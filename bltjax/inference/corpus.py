"""A report of scored corpora: sizes, patch lengths by source, scoring speed.

Counts and rates are of all records; lengths and entropies of a sample, the same for the same seed.
Every folder of records is one source here, as in `data.train`. `entropies` writes the report
of its folder when it is done; `python -m bltjax corpus --records A B C` compares several.
"""

import argparse
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from bltjax.config.arguments import path_argument
from bltjax.config.model import Patching
from bltjax.config.rows import patch_rows
from bltjax.data.calibrate import calibrate, sample_documents
from bltjax.data.packing import cut_document
from bltjax.data.records import Document, RecordDocuments, read_shard_info
from bltjax.distributed.topology import read_topology
from bltjax.families import family_of
from bltjax.progress import duration, quantity
from bltjax.system.storage import check_writable, write_text
from bltjax.text.patching import patch_lengths
from bltjax.weights.export import read_model_config
from bltjax.weights.workdir import is_number

SAMPLE_BYTES = 2 << 20
THRESHOLDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # nats
MEAN_PATCH = 4.5  # bytes
REPORT, PICTURE = "report.json", "report.png"
MFU = 0.4  # assumed share of a pod's peak
TERABYTE = 1e12
LONGEST = 24  # bytes of a patch; longer ones are counted together


class Source(NamedTuple):
    """One folder of records, and a sample of its documents."""

    name: str
    records: RecordDocuments
    sample: list[Document]


def usual_threshold(source: Source) -> float:
    """The threshold for patches of 4.5 bytes, or the released BLT's if none gives them."""
    try:
        return calibrate(source.sample, Patching(), MEAN_PATCH)[0]
    except ValueError:
        return Patching().threshold


def lengths_at(source: Source, threshold: float) -> np.ndarray:
    """Length in bytes of every patch of the sample, BOS' and EOS' included."""
    patching = Patching(threshold=threshold)
    cuts = (
        cut_document(document, patch_rows(patching)).starts_N1[:-1] for document in source.sample
    )
    return np.concatenate([patch_lengths(starts_N) for starts_N in cuts])


def made_of(side: epath.Path) -> dict:
    """Scoring time, process and device of a shard; empty if not recorded."""
    try:
        made = read_shard_info(side)[1] if side.exists() else {}
        seconds, kinds = made.get("seconds"), {"process": int, "device": str}
        whole = is_number(seconds) and 0 <= seconds < float("inf")
        if made and not (whole and all(type(made.get(k)) is kind for k, kind in kinds.items())):
            raise ValueError(f"{side} is damaged: made is {made}")
    except ValueError as error:
        print(f"{error}; the scoring speed of its shard is left out")
        return {}
    return made


def scoring_rate(records: RecordDocuments) -> dict | None:
    """Scoring speed of the shards; None if not recorded."""
    made, text_bytes = [], 0
    for shard in records.manifest.shards:
        if found := made_of((records.folder / shard.name).with_suffix(".json")):
            made.append(found)
            text_bytes += shard.text_bytes
    seconds = sum(shard["seconds"] for shard in made)
    if not seconds:
        return None
    return {
        "processes": len({shard["process"] for shard in made}),
        "device": made[0]["device"],
        "bytes_per_second_per_device": text_bytes / seconds,
        "seconds_of_all_devices": seconds,
    }


def scoring_flops(records: RecordDocuments) -> float | None:
    """FLOPs per byte of the byte LM that scored; None if it has moved."""
    try:
        model = read_model_config(records.manifest.byte_lm_path).model
    except (ValueError, OSError):
        return None
    row = 1 << 14
    return family_of(model).forward_flops(model, row, row) / row


def measure(source: Source, thresholds: Sequence[float]) -> dict:
    """The numbers of one source."""
    manifest = source.records.manifest
    documents, text_bytes = manifest.total("documents"), manifest.total("text_bytes")
    entropies = np.concatenate([document.entropies[:-1] for document in source.sample])
    return {
        "documents": documents,
        "text_bytes": text_bytes,
        "shards": len(manifest.shards),
        "mean_document_bytes": text_bytes / documents,
        "sample_bytes": sum(len(document.text) for document in source.sample),
        "mean_entropy_bits": float(entropies.mean() / np.log(2)),
        "mean_patch_bytes": {f"{t:.3g}": float(lengths_at(source, t).mean()) for t in thresholds},
        "scoring": scoring_rate(source.records),
        "scoring_flops_per_byte": scoring_flops(source.records),
    }


def projection(found: dict, pod: str | None, mfu: float) -> list[str]:
    """The time for 1 TB: at the measured rate, or on a pod at an assumed one."""
    lines, flops, scoring = [], found["scoring_flops_per_byte"], found["scoring"]
    topology = read_topology(pod) if pod else None
    if scoring:
        rate = scoring["bytes_per_second_per_device"]
        same = topology is not None and topology.chip.kind == scoring["device"]
        count = topology.devices if same else 256
        lines.append(
            f"scored at {quantity(rate)}B/s per device ({scoring['device']}):"
            f" 1 TB takes {duration(TERABYTE / rate)} on one,"
            f" {duration(TERABYTE / rate / count)} on {count}"
        )
        if same:
            return lines
    if pod and flops:
        rate = topology.devices * topology.chip.flops * mfu / flops
        lines.append(
            f"1 TB on {pod} ({topology.chips} chips): {duration(TERABYTE / rate)} at"
            f" {quantity(rate)}B/s, if {mfu:.0%} of the chips' peak is reached"
            f" ({quantity(flops)}FLOP per byte); not measured"
        )
    elif pod:
        lines.append(f"{pod}: not projected, because the byte LM has moved")
    return lines


def bars(lengths: np.ndarray, width: int = 40) -> list[str]:
    """A histogram for the terminal: share of the bytes in patches of each length."""
    counts = np.bincount(np.minimum(lengths, LONGEST), weights=lengths, minlength=LONGEST + 1)
    shares = counts / counts.sum()
    lines = []
    for length in range(1, int(np.flatnonzero(shares > 5e-4)[-1]) + 1):
        bar = "█" * round(width * shares[length] / shares.max())
        name = f"{length}+" if length == LONGEST else str(length)
        lines.append(f"  {name:>3}  {shares[length]:6.1%}  {bar}".rstrip())
    return lines


def text_report(sources: Sequence[Source], found: dict, threshold: float) -> str:
    """The report for a terminal."""
    width = max(16, *(len(source.name) for source in sources))
    heads = ("bytes", "documents", "mean bytes", "bits per byte of the byte LM")
    lines = [f"{'':{width}}" + "".join(f"  {head:>10}" for head in heads)]
    for source in sources:
        mine = found[source.name]
        lines.append(
            f"{source.name:{width}}  {quantity(mine['text_bytes']):>10}  {mine['documents']:>10,}"
            f"  {mine['mean_document_bytes']:>10,.0f}  {mine['mean_entropy_bits']:>10.3f}"
        )
    names = list(found[sources[0].name]["mean_patch_bytes"])
    lines += ["", "mean patch in bytes, by threshold in nats"]
    lines.append(f"{'':{width}}" + "".join(f"  {name:>6}" for name in names))
    for source in sources:
        means = found[source.name]["mean_patch_bytes"].values()
        lines.append(f"{source.name:{width}}" + "".join(f"  {mean:6.2f}" for mean in means))
    for source in sources:
        title = f"{source.name}: bytes by the length of their patch, threshold {threshold:.3g}"
        lines += ["", title, *bars(lengths_at(source, threshold))]
    return "\n".join([*lines, ""])


def draw_curves(sources: Sequence[Source], threshold: float):
    """A matplotlib Figure: entropies with the threshold, and patch lengths, one line per source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for source in sources:
        entropies = np.concatenate([document.entropies[:-1] for document in source.sample])
        edges = np.linspace(0, 5.6, 57)
        shares = np.histogram(entropies, edges)[0] / len(entropies)
        label = source.name.replace("$", r"\$")  # a dollar sign in a name starts no formula
        style = dict(fill=len(sources) == 1, alpha=0.8, label=label, lw=1.5)
        left.stairs(shares, edges, **style)
        lengths = np.minimum(lengths_at(source, threshold), LONGEST)
        counts = np.bincount(lengths, minlength=LONGEST + 1)[1:]
        edges = np.arange(1, LONGEST + 2) - 0.5
        right.stairs(counts / counts.sum(), edges, **style)
    left.axvline(threshold, color="#c33333", lw=1, ls="--")
    left.set(xlabel="entropy of the next byte, nats", ylabel="share of bytes", xlim=(0, 5.6))
    left.annotate(f" threshold {threshold:.3g}", (threshold, 0.97), color="#c33333",
                  xycoords=("data", "axes fraction"), va="top", fontsize=8)  # fmt: skip
    right.set(xlabel=f"bytes in a patch ({LONGEST}: or more)", ylabel="share of patches",
              xlim=(0.5, LONGEST + 0.5))  # fmt: skip
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    if len(sources) > 1:
        right.legend(frameon=False, fontsize=8)
    return figure


def write_report(
    folders: Sequence[epath.Path],
    out: epath.Path | None = None,
    *,
    threshold: float | None = None,
    pod: str | None = None,
    mfu: float = MFU,
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
) -> dict:
    """Prints the report of folders of records, and writes it with its picture into `out`.

    out: by default the first folder. threshold: by default one that gives the first source patches
    of 4.5 bytes, if there is one. The picture needs matplotlib and is skipped without it.

    Raises:
      ValueError: for a folder without intact records, or an unknown pod.
    """
    out = epath.Path(folders[0]) if out is None else out
    sources = []
    for folder in folders:
        records = RecordDocuments(folder)
        sources.append(Source(str(folder), records, sample_documents(records, sample_bytes, seed)))
    check_writable(out)
    if threshold is None:
        threshold = usual_threshold(sources[0])
    thresholds = sorted({*THRESHOLDS, threshold})
    found = {source.name: measure(source, thresholds) for source in sources}
    print(text_report(sources, found, threshold))
    for source in sources:
        for line in projection(found[source.name], pod, mfu):
            print(f"{source.name}: {line}" if len(sources) > 1 else line)
    write_text(out / REPORT, json.dumps(found, indent=1) + "\n")
    try:
        figure = draw_curves(sources, threshold)
    except ImportError:
        print(f"report: {out / REPORT}; for its picture, pip install matplotlib")
        return found
    with (out / PICTURE).open("wb") as file:
        figure.savefig(file, format="png")
    print(f"report: {out / REPORT}, {out / PICTURE}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--records",
        required=True,
        nargs="+",
        type=path_argument,
        help="folders written by entropies",
    )
    add("--out", type=path_argument, help="where to write it (default: the first)")
    add(
        "--threshold",
        type=float,
        help=f"nats, of the histograms (default: for patches of {MEAN_PATCH} bytes)",
    )
    add("--pod", help="also project 1 TB on this slice, such as v5p:4x4x8")
    add("--mfu", type=float, default=MFU, help=f"share of the pod's peak (default: {MFU})")
    add("--sample_bytes", type=int, default=SAMPLE_BYTES, help="text to sample")
    add("--seed", type=int, default=0, help="seed of the sample")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError("corpus takes no --config settings")
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu ({args.mfu}) must be in 0 ... 1")
    write_report(
        args.records,
        args.out,
        threshold=args.threshold,
        pod=args.pod,
        mfu=args.mfu,
        sample_bytes=args.sample_bytes,
        seed=args.seed,
    )
