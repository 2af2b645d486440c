"""Assignment of documents to shards of records: the same for any number of processes."""

import dataclasses
import json
import zlib
from typing import NamedTuple

from etils import epath

from bltjax.config.data import SourceConfig
from bltjax.config.fields import differences
from bltjax.data.records import ShardInfo, read_shard_info
from bltjax.data.sources.by_path import Documents
from bltjax.distributed import processes
from bltjax.progress import Progress
from bltjax.system.storage import read_json, write_text

SHARD_BYTES = 64 << 20
DEFAULTS = {field.name: field.default for field in dataclasses.fields(SourceConfig)}


class Shard(NamedTuple):
    """A file of records of a plan: its documents and their bytes, and the plan's checksum."""

    path: epath.Path
    documents: range
    text_bytes: int
    plan: int

    def info(self) -> ShardInfo | None:
        """Its manifest entry; None if it is not complete."""
        return info_of(self.path, len(self.documents), self.text_bytes, self.plan)


def plan_shards(lengths: list[int], shard_bytes: int) -> list[range]:
    """Runs of documents, each closed once it holds shard_bytes; depends on the corpus alone."""
    shards, first, held = [], 0, 0
    for index, length in enumerate(lengths):
        held += length
        if held >= shard_bytes:
            shards.append(range(first, index + 1))
            first, held = index + 1, 0
    if first < len(lengths):
        shards.append(range(first, len(lengths)))
    return shards


def make_shard_plan(
    documents: Documents, source: SourceConfig, identity: str, shard_bytes: int, out: epath.Path
) -> tuple[dict, list[Shard]]:
    """The scoring plan, the same for every process; and the shards in the folder `out`."""
    lengths, checksum = [], 0
    progress = Progress("reading", len(documents), " documents", quiet=not processes.is_primary())
    for index in range(len(documents)):
        text = documents[index].text
        lengths.append(len(text))
        checksum = zlib.crc32(text, checksum)
        progress.advance(1)
    plan = {
        "byte_lm": identity,
        "source": {k: v for k, v in dataclasses.asdict(source).items() if k != "weight"},
        "documents": len(lengths),
        "text_bytes": sum(lengths),
        "text_crc32": checksum,
        "shard_bytes": shard_bytes,
    }
    parts, identifier = plan_shards(lengths, shard_bytes), plan_checksum(plan)
    shards = []
    for number, part in enumerate(parts):
        path = out / f"shard-{number:05d}-of-{len(parts):05d}.array_record"
        shards.append(Shard(path, part, sum(lengths[part.start : part.stop]), identifier))
    return plan, shards


def plan_checksum(plan: dict) -> int:
    """Checksum of a plan, stored with its shards; settings of a source may be added later."""
    # A setting that this version doesn't know counts as its default.
    given = plan["source"].items()
    source = {key: value for key, value in given if value != DEFAULTS.get(key, value)}
    return zlib.crc32(json.dumps(plan | {"source": source}, sort_keys=True).encode())


def plan_there(path: epath.Path, plan: dict) -> dict | None:
    """The plan stored in a folder; None if there is none, or none that can be read."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
        for key, value in plan.items():
            if type(found.get(key)) is not type(value):
                raise ValueError(f"{path} is no plan of shards: {key} is {found.get(key)!r}")
    except ValueError as error:
        print(f"{error}; it is lost")
        return None
    added = {key: DEFAULTS[key] for key in plan["source"].keys() - found["source"].keys()}
    return found | {"source": added | found["source"]}


def agree_on(plan: dict, out: epath.Path) -> None:
    """Stores the plan in `out`, or compares it with the one of another process or an earlier run.

    Raises:
      ValueError: with the differences, if there is another plan; or if the plan is lost, and a
        shard exists that can't be matched to this one.
    """
    path = out / "plan.json"
    there = plan_there(path, plan)
    if there is None:
        for side in sorted(out.glob("shard-*-of-*.json")):
            made = read_side(side)[1]
            if made is not None and made.get("plan") != plan_checksum(plan):
                raise ValueError(
                    f"{path} is lost, and nothing says that the shard of {side.name} was scored by"
                    " this byte LM from this corpus. Give another --out, or remove that folder."
                )
        write_text(path, json.dumps(plan))
        there = plan_there(path, plan)
    lines = differences(there or {}, plan)
    if lines:
        raise ValueError(
            f"{out} was started with another byte LM or corpus (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nGive another --out, or remove that folder; on a pod, give all processes the same."
        )


def side_path(path: epath.Path) -> epath.Path:
    """The file beside a shard with its ShardInfo, its process and its scoring time."""
    return path.with_suffix(".json")


def read_side(side: epath.Path) -> tuple[ShardInfo | None, dict | None]:
    """The manifest entry of a shard, and how it was made; None if there is none.

    A damaged file counts as missing, and is logged.
    """
    if not side.exists():
        return None, None
    try:
        return read_shard_info(side)
    except ValueError as error:
        print(f"{error}: its shard is scored again")
        return None, None


def info_of(path: epath.Path, documents: int, text_bytes: int, plan: int) -> ShardInfo | None:
    """The manifest entry of a complete shard of this plan (by checksum), or None."""
    info, made = read_side(side_path(path))
    if info is None:
        return None
    asked = (path.name, documents, text_bytes, made.get("plan", plan))
    if asked != (info.name, info.documents, info.text_bytes, plan):
        print(f"{side_path(path)} is of another shard: it is scored again")
        return None
    return info
