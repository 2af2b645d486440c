"""Examples of an encoder and a decoder, from a window of one document: masked spans, or a prefix
and what follows it (ByT5; T5's objectives).

    window      t h e _ p a t c h _ b e g i n s _ h e r e         ids of text, no specials
                        \\_______/     \\_______/
    corrupted   encoder   t h e _ S0 _ b e S1 _ h e r e E         S0, S1, ... sentinels, E EOS
                targets   S0 p a t c h S1 g i n s E               no sentinel closes the last span
                decoder   0 S0 p a t c h S1 g i n s               its input: targets, one later

    prefix      encoder   t h e _ p a S0 E                        split anywhere
                targets   S0 t c h _ b e g i n s _ h e r e E

A window starts with a gap and ends with a span. Spans never leave the document that they are in.
A window ends in EOS on both sides, whether its document ends there or is cut, as published. With
the alphabet "byt5" these are the published examples; "blt" has our ids in the same places.

Of bytes only in the decoder's text, bits per byte of `prefix` compare with those of a causal model
that scores the same continuation after the same prefix. Those of `corrupted` compare with no causal
model: the encoder sees both sides of a span.
"""

from typing import NamedTuple

import numpy as np

from bltjax.text.alphabet import BLT_ALPHABET, Alphabet
from bltjax.text.sentinels import START, masked, sentinel


class Pair(NamedTuple):
    """One example. All but `encoder_ids` lie along the decoder's positions."""

    encoder_ids: np.ndarray  # int32
    decoder_ids: np.ndarray  # int32, the decoder's input: START, then the targets but the last
    targets: np.ndarray  # int32
    weights: np.ndarray  # float32: 1 for every target
    target_bytes: np.ndarray  # int32: 1 for a target that is a byte of text, not a sentinel or EOS


def windows(length: int, longest: int) -> list[slice]:
    """A document of `length` ids cut into windows of `longest`, the last one shorter; an empty
    document has none."""
    return [slice(at, min(at + longest, length)) for at in range(0, length, longest)]


def lengths(length: int, noise: float = 0.15, mean_span: float = 20) -> tuple[int, int]:
    """Positions of encoder and decoder that `corrupted` makes of a window of `length` ids."""
    ids, spans = masked(length, noise, mean_span)
    return length - ids + spans + 1, ids + spans + 1


def longest_window(encoder: int, decoder: int, noise: float = 0.15, mean_span: float = 20) -> int:
    """The longest window whose example has at most so many positions: 1193 for the published (1024,
    189)."""
    longest = 0
    while all(
        made <= most
        for made, most in zip(
            lengths(longest + 1, noise, mean_span), (encoder, decoder), strict=True
        )
    ):
        longest += 1
    return longest


def parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random partition of `total` into `count` parts of at least 1, each as likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def corrupted(
    ids: np.ndarray,
    rng: np.random.Generator,
    noise: float = 0.15,
    mean_span: float = 20,
    alphabet: Alphabet = BLT_ALPHABET,
) -> Pair:
    """The window with masked spans, which the decoder writes (ByT5, 3.1; T5, 3.1.4).

    A window of one id, or none, has no span, since it would start with a gap; so its only target is
    EOS.
    """
    count, spans = masked(len(ids), noise, mean_span)
    if not spans:
        return pair([ids], [], alphabet)
    sizes = np.empty(2 * spans, int)  # of gap 0, span 0, gap 1, ...
    sizes[::2], sizes[1::2] = parts(len(ids) - count, spans, rng), parts(count, spans, rng)
    pieces = np.split(ids, np.cumsum(sizes)[:-1])
    return pair(pieces[::2], pieces[1::2], alphabet)


def prefix(ids: np.ndarray, rng: np.random.Generator, alphabet: Alphabet = BLT_ALPHABET) -> Pair:
    """The window's beginning, and its rest for the decoder; it has at least one id, if there is
    one, and every size is as likely."""
    at = int(rng.integers(max(len(ids), 1)))
    return pair([ids[:at]], [ids[at:]], alphabet)


def pair(gaps: list[np.ndarray], spans: list[np.ndarray], alphabet: Alphabet) -> Pair:
    """The example of a window that is cut into gaps, each but perhaps a last one before a span."""
    read, written, is_byte = [], [], []
    for number, span in enumerate(spans):
        mark = [sentinel(number, alphabet)]
        read += [gaps[number], mark]
        written += [mark, span]
        is_byte += [[0], np.ones(len(span))]
    read += [*gaps[len(spans) :], [alphabet.eos]]
    targets = np.concatenate([*written, [alphabet.eos]]).astype(np.int32)
    return Pair(
        np.concatenate(read).astype(np.int32),
        np.append(START, targets[:-1]).astype(np.int32),
        targets,
        np.ones(len(targets), np.float32),
        np.concatenate([*is_byte, [0]]).astype(np.int32),
    )


def restored(
    encoder_ids: np.ndarray, targets: np.ndarray, alphabet: Alphabet = BLT_ALPHABET
) -> np.ndarray:
    """The window of an example, int32: each sentinel that the encoder reads gives way to its span.

    Exact for text without the sentinels' bytes, as UTF-8 is. With other bytes an example is as good
    to learn from, since `target_bytes` goes by place; only a reader of ids can't tell them apart.

    Raises:
      ValueError: if the targets lack a span.
    """
    spans: list[list[int]] = []
    for id_ in targets[:-1]:
        if id_ == sentinel(len(spans), alphabet):
            spans.append([])
        elif spans:
            spans[-1].append(id_)
    found: list[int] = []
    next_ = 0
    for id_ in encoder_ids[:-1]:
        if id_ != sentinel(next_, alphabet):
            found.append(id_)
            continue
        if next_ == len(spans):
            raise ValueError(f"the encoder reads sentinel {next_}, but there are {next_} spans")
        found += spans[next_]
        next_ += 1
    return np.array(found, np.int32)
