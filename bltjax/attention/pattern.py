"""Static description of an attention pattern, used to pick tile shapes at trace time.

The ranges themselves are data; the pattern is a promise about them that lets an implementation
choose static shapes. Each of BLT's attentions has one of the first three; encoders, whose positions
also see what follows them, have the others:

    Sliding(span)    query i sees keys from i + (T - Q) - span + 1 to i + (T - Q), or some of them
    Pooling(slots)   each run of `slots` queries shares a range; ranges of different runs are
                     disjoint and ascending: every key belongs to at most one run
    Reading(slots)   a range is empty or exactly `slots` keys, aligned to a multiple of `slots`
    Whole()          any ranges, such as the whole document of each query
    Blocks(size)     query i sees no key that is `size` or more away from i + (T - Q), such as the
                     block of `size` positions that it lies in
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sliding:
    span: int


@dataclass(frozen=True)
class Pooling:
    slots: int


@dataclass(frozen=True)
class Reading:
    slots: int


@dataclass(frozen=True)
class Whole:
    pass


@dataclass(frozen=True)
class Blocks:
    size: int


Pattern = Sliding | Pooling | Reading | Whole | Blocks
