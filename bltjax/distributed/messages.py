"""Messages of other libraries on which a decision depends, all in one table.

Where a library raises one kind of error for many reasons, only the text distinguishes them, and a
new version may word it differently. So each text stands here once, and a test makes the library
raise the error for real (tests/distributed/test_messages.py); an entry without such a test fails
it.
"""

import errno
import re
from typing import NamedTuple


class Known(NamedTuple):
    pattern: str  # a regular expression, searched in the text
    library: str
    why: str  # the decision that depends on it


# Errors of this process itself, and the names of their statuses. Others of jaxlib, in a run of
# many, come of a lost process.
OWN_FAULTS = {
    "out of memory": "RESOURCE_EXHAUSTED",
    "invalid argument": "INVALID_ARGUMENT",
    "unimplemented": "UNIMPLEMENTED",
    "not found": "NOT_FOUND",
}
KNOWN_MESSAGES = {
    "no cluster": Known(
        r"coordinator_address should be defined",
        "jax.distributed",
        "ValueError where jax knows no cluster: this process is all there is",
    ),
    "broken collective": Known(
        r"(?s)\A.{0,54} Gloo ",
        "jaxlib (gloo)",
        "ValueError of a collective that was broken off: another process ended, restart",
    ),
    "disk full": Known(
        r"(?i)no space left",
        "tensorstore, array_record",
        "ValueError or RuntimeError without an errno: make room and run the command again",
    ),
    # TensorStore begins with the name of a status of absl. Its HTTP driver, by which it reads
    # buckets, gives up with ABORTED.
    "storage away": Known(
        r"\A(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ",
        "tensorstore",
        "ValueError while a checkpoint is read: restart, nothing is damaged",
    ),
    "storage refuses": Known(
        r"\A(PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED): ",
        "tensorstore, jaxlib",
        "error while a checkpoint is read: end with the cause, nothing is damaged",
    ),
    # No such file, a checksum, fewer bytes than there must be, bytes that zstd can't read; what
    # can't be decoded otherwise has a message without a status.
    "damaged files": Known(
        r"\A((NOT_FOUND|DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION): "
        r"|Error (opening|reading) .*: Error decoding )",
        "tensorstore",
        "ValueError while a checkpoint is read: move it aside, take the one before it",
    ),
    "larger than a chip": Known(
        r"(?s)\ARESOURCE_EXHAUSTED.*? temporaries \(([\d.]+)([KMGT])i?B?\) exceeds",
        "libtpu",
        "JaxRuntimeError of the compiler: the program doesn't fit; its groups are number and unit",
    ),
} | {
    name: Known(
        rf"\A{status}", "jaxlib", "JaxRuntimeError that this process meets again after a restart"
    )
    for name, status in OWN_FAULTS.items()
}


def says(error: BaseException, *names: str) -> re.Match | None:
    """The match of the error's text with one of the named messages, or None."""
    matches = (re.search(KNOWN_MESSAGES[name].pattern, str(error)) for name in names)
    return next(filter(None, matches), None)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of any library means a full disk."""
    return getattr(error, "errno", None) == errno.ENOSPC or says(error, "disk full") is not None
