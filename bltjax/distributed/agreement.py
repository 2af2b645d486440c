"""Processes compare versions and settings before they work together."""

import hashlib
import json
import socket
from pathlib import Path

import jax
import jaxlib

from bltjax.config.fields import differences
from bltjax.distributed.coordinator import process_index
from bltjax.distributed.processes import allgather_json, is_primary


def code_version() -> str:
    """A checksum of this package's sources."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_agreement(settings: dict) -> None:
    """Raises ValueError, naming hosts and differences, unless all processes match.

    settings: the settings of this process, as JSON. Versions and sources are compared too.
    """
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "sources": code_version()}
    mine = {"bltjax": settings, "versions": versions}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    digests = allgather_json("comparing settings", digest)
    if len(set(digests)) == 1:
        return
    # Whole settings are sent only now: by process 0, and by those that differ from it.
    differs = digests[process_index()] != digests[0]
    answers = allgather_json(
        "comparing settings", [socket.gethostname(), mine if differs or is_primary() else None]
    )
    lines = []
    for index, (host, theirs) in enumerate(answers):
        if digests[index] != digests[0]:
            lines.append(f"process {index} ({host}):")
            lines += [f"  {line}" for line in differences(answers[0][1], theirs)]
    raise ValueError(
        f"processes differ from process 0 ({answers[0][0]}; its value -> theirs):\n  "
        + "\n  ".join(lines)
        + "\nStart all with the same command, from the same copy of bltjax and of its packages."
    )
