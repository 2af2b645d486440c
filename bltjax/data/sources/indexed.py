"""Documents that are indexed when a source is opened, and read on access."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from bltjax.data.fingerprint import fingerprint_of


class IndexedDocuments:
    """Documents by number; those without text are left out."""

    bad = empty = 0  # lines that are no documents, and texts that are left out
    paths: Sequence[Path] = ()
    facts: dict  # about the source, JSON-able, whatever its path
    spans: np.ndarray  # of each document: where it is in its file, or its row

    def __len__(self) -> int:
        return len(self.spans)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the source and its files, independent of the path."""
        return fingerprint_of(self.facts | {"documents": len(self)}, self.paths)
