"""A Markdown table of plans written by `python -m bltjax plan --json`.

Run by launch/plan_all.sh. Below the table: bytes sent per chip on 512 chips against 64. The exit
status is 1 if a plan doesn't fit, or compiled to more FLOPs or bytes than it should.
"""

import sys
from pathlib import Path

from bltjax.system.storage import read_json

COLUMNS = (
    "plan", "slice", "rows per chip", "HBM per chip", "compiled / exact", "sent per chip",
    "step >=", "by", "MFU <=", "bytes/s per chip <=",
)  # fmt: skip


MOST_RATIO = 1.10  # compiled FLOPs to exact ones
MOST_GROWTH = 1.03  # of bytes sent per chip, at equal rows per chip
GROWTH = ("8b-v5p-64", "8b-v5p-512")


def rows_of_chip(plan: dict) -> int:
    """Rows per chip and step; chips along `tensor` share them."""
    return plan["rows"] // (plan["mesh"]["data"] * plan["mesh"]["fsdp"])


def sent_bytes(plan: dict) -> float:
    return sum(each["bytes"] for each in plan["collectives"])


def cells(name: str, plan: dict) -> list[str]:
    memory, bound = plan["hbm_bytes"], plan["bound"]
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    rows = f"{plan['accumulate']} x {rows_of_chip(plan) // plan['accumulate']}"
    used = f"{memory['total'] / 2**30:.1f} of {memory['capacity'] / 2**30:.1f} GiB"
    used += "" if plan["fits"] else ", does not fit"
    row = [name, slices + plan["topology"], rows, used]
    if bound is None:
        return row + [""] * (len(COLUMNS) - len(row))
    return [
        *row,
        f"{plan['flops']['ratio']:.3f}",
        f"{sent_bytes(plan) / 1e9:.1f} GB",
        f"{bound['step_s']:.2f} s",
        bound["limit"],
        f"{bound['mfu']:.1%}",
        f"{bound['bytes_per_second_per_chip'] / 1e3:.1f} kB/s",
    ]


def main(paths: list[str]) -> int:
    plans = {Path(path).stem: read_json(Path(path)) for path in paths}
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(*item) for item in plans.items())]
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    faults = [f"{name} does not fit" for name, plan in plans.items() if not plan["fits"]]
    faults += [
        f"{name} compiled to {plan['flops']['ratio']:.3f} times the exact FLOPs, over {MOST_RATIO}"
        for name, plan in plans.items()
        if plan["bound"] and plan["flops"]["ratio"] > MOST_RATIO
    ]
    few, many = (plans.get(name) for name in GROWTH)
    if few and many and few["bound"] and many["bound"]:
        if rows_of_chip(few) != rows_of_chip(many):
            raise ValueError(
                f"{' and '.join(GROWTH)} have {rows_of_chip(few)} and {rows_of_chip(many)} rows"
                " per chip: only equal numbers are compared"
            )
        growth = sent_bytes(many) / sent_bytes(few)
        print(f"\n{GROWTH[1]} sends {growth:.4f} times what {GROWTH[0]} sends, chip for chip")
        if growth > MOST_GROWTH:
            faults.append(
                f"what a chip sends grows by {growth - 1:.1%}, over {MOST_GROWTH - 1:.0%}"
            )
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
