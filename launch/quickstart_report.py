"""Gathers the output of the quickstart's stages in WORKDIR into WORKDIR/report.json and a summary.

python launch/quickstart_report.py WORKDIR
"""

import json
import sys
from pathlib import Path

from bltjax.convert.inspect import last_report
from bltjax.system.storage import read_json
from bltjax.weights.workdir import read_reports


def means(metrics: Path, names: tuple[str, ...]) -> dict[str, float]:
    lines = [report for report in read_reports(metrics) if names[0] in report]
    return {name: sum(line[name] for line in lines) / len(lines) for name in names}


def main(workdir: Path) -> None:
    blt = read_json(workdir / "evaluation_blt.json")
    byte_lm = read_json(workdir / "evaluation_byte_lm.json")
    runs = {name: last_report(workdir / name / "metrics.jsonl") for name in ("blt", "byte_lm")}
    fill = means(workdir / "blt" / "metrics.jsonl", ("byte_fill", "patch_fill"))
    seconds = {
        path.name: int(path.read_text(encoding="utf-8"))
        for path in sorted((workdir / "seconds").iterdir(), key=lambda path: path.stat().st_mtime)
    }
    report = {
        "bits_per_byte": {
            "blt": blt["bits_per_byte"],
            "byte_lm": byte_lm["bits_per_byte"],
            **blt["compressors"],
        },
        "training_flops": {name: run["training_flops"] for name, run in runs.items()},
        "mean_patch_bytes": blt["mean_patch_bytes"],
        **fill,
        "train_bytes_per_second": runs["blt"]["bytes_per_second"],
        "seconds": seconds,
        "parameters": {"blt": blt["parameters"], "byte_lm": byte_lm["parameters"]},
        "held_out_bytes": blt["text_bytes"],
    }
    (workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    width = max(map(len, report["bits_per_byte"]))
    print("\nbits per byte on the held-out works (lower is better)")
    for name, bits in sorted(report["bits_per_byte"].items(), key=lambda item: item[1]):
        print(f"  {name.replace('_', ' '):{width}}  {bits:.3f}  {'#' * round(20 * bits)}")
    flops = report["training_flops"]
    print(
        f"BLT spent {flops['blt'] / 1e12:.1f} TFLOP, the byte LM {flops['byte_lm'] / 1e12:.1f};"
        f" patches average {report['mean_patch_bytes']:.2f} bytes;"
        f" rows were {fill['byte_fill']:.1%} full of bytes, {fill['patch_fill']:.1%} of patches"
    )
    print("seconds: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    print(f"report: {workdir / 'report.json'}")
    print(f"patches of a held-out text: {workdir / 'patches.png'}, {workdir / 'patches.html'}")
    print(f"the run, its curves and samples: {workdir / 'blt' / 'page.html'}")
    print(f"more text: python -m bltjax generate --workdir={workdir / 'blt'} --prompt='And God'")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
