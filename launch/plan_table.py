"""Plans as `python -m bltjax plan --json` wrote them, as a table in Markdown.

Run by launch/plan_all.sh. The exit status is 1 if any doesn't fit.
"""

import json
import sys
from pathlib import Path

COLUMNS = (
    "plan", "slice", "rows a chip", "HBM a chip", "compiled / exact", "sent a chip", "step >=",
    "by", "MFU <=", "bytes/s a chip <=",
)  # fmt: skip


def cells(name: str, plan: dict) -> list[str]:
    memory, bound = plan["hbm_bytes"], plan["bound"]
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    chips = plan["mesh"]["data"] * plan["mesh"]["fsdp"] * plan["mesh"]["tensor"]
    rows = f"{plan['accumulate']} x {plan['rows'] // plan['accumulate'] // chips}"
    used = f"{memory['total'] / 2**30:.1f} of {memory['capacity'] / 2**30:.1f} GiB"
    used += "" if plan["fits"] else ", does not fit"
    if bound is None:
        return [name, slices + plan["topology"], rows, used] + [""] * (len(COLUMNS) - 4)
    sent = sum(each["bytes"] for each in plan["collectives"])
    return [
        name,
        slices + plan["topology"],
        rows,
        used,
        f"{plan['flops']['ratio']:.3f}",
        f"{sent / 1e9:.1f} GB",
        f"{bound['step_s']:.2f} s",
        bound["limit"],
        f"{bound['mfu']:.1%}",
        f"{bound['bytes_per_second_per_chip'] / 1e3:.1f} kB/s",
    ]


def main(paths: list[str]) -> int:
    plans = {Path(path).stem: json.loads(Path(path).read_text()) for path in paths}
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(*item) for item in plans.items())]
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return 0 if all(plan["fits"] for plan in plans.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
