"""Fingerprints of documents: whether a corpus is unchanged, wherever it is stored now.

A fingerprint depends on content and order alone, not on names, folders or time stamps. Of a file it
uses the size and the first, middle and last 64 KiB: all of a small file, a sample of a large one.
So it is cheap, and detects another corpus, another order and another cut, but not a few bytes
changed in place deep in a large file.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

SAMPLE_BYTES = 1 << 16


def fingerprint_of(facts: dict, paths: Iterable[Path] = ()) -> str:
    """32 hex digits of JSON-able facts, and of files in their order, without empty ones.

    Raises:
      OSError: for a file that can't be read.
    """
    checksum = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            if not size:
                continue
            checksum.update(size.to_bytes(8, "little"))
            middle = max(SAMPLE_BYTES, (size - SAMPLE_BYTES) // 2)
            last = max(middle + SAMPLE_BYTES, size - SAMPLE_BYTES)
            for begin in (0, middle, last):
                file.seek(begin)
                checksum.update(file.read(SAMPLE_BYTES))
    return checksum.hexdigest()
