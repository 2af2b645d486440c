"""Sampling of the next byte, on the device, and its checked settings.

Every row has a random key of its own, folded with the number of bytes it has generated. So a row's
samples depend neither on its neighbours nor on when the batch got to it. In order: the repetition
penalty, forbidden ids (specials other than EOS; bytes that break a character), the temperature,
top-k, top-p, min-p.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bltjax.text.alphabet import BLT_ALPHABET, Alphabet

BYTES = 256


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and a penalty of 1 change nothing.

    repetition_penalty: logits of ids that occur in the text are divided by it, or multiplied if
    negative. valid_utf8: only bytes that begin or continue a character, if all of it fits in the
    bytes left.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    valid_utf8: bool = False

    def __post_init__(self):
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature is {self.temperature}, not >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, not >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, not in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, not in [0, 1]")
        if not 0 < self.repetition_penalty < np.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, not > 0")

    def steps(self, alphabet: Alphabet = BLT_ALPHABET) -> "Steps":
        """The static part of the settings, for a model of an alphabet."""
        random = self.temperature > 0
        return Steps(
            random,
            random and self.top_k > 0,
            random and self.top_p < 1,
            random and self.min_p > 0,
            self.repetition_penalty != 1,
            self.valid_utf8,
            alphabet,
        )

    @property
    def numbers(self) -> "Numbers":
        numbers = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return Numbers(*map(np.float32, numbers))


GREEDY = Sampling()


class Steps(NamedTuple):
    """The static part of the settings: which steps a program has."""

    random: bool
    top_k: bool
    top_p: bool
    min_p: bool
    penalises: bool
    valid_utf8: bool
    alphabet: Alphabet = BLT_ALPHABET


class Numbers(NamedTuple):
    """The numbers of the steps, which are data."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def utf8_table() -> tuple[np.ndarray, np.ndarray]:
    """int32 [states, 256], the state after a byte, -1 where it may not follow; and the bytes that a
    character in each state still lacks. State 0 is between characters (RFC 3629, table 3-7)."""
    # The first continuation byte has a range of its own after four of the lead bytes.
    one, two, three = 1, 2, 3
    following = {
        one: (0x80, 0xBF, 0),
        two: (0x80, 0xBF, one),
        three: (0x80, 0xBF, two),
        4: (0xA0, 0xBF, one),  # E0: no overlong forms
        5: (0x80, 0x9F, one),  # ED: no surrogates
        6: (0x90, 0xBF, two),  # F0: no overlong forms
        7: (0x80, 0x8F, two),  # F4: nothing above U+10FFFF
    }
    table = np.full((8, BYTES), -1, np.int32)
    table[0, :0x80] = 0
    table[0, 0xC2:0xE0] = one
    table[0, 0xE0:0xF0] = two
    table[0, 0xF0:0xF5] = three
    table[0, [0xE0, 0xED, 0xF0, 0xF4]] = 4, 5, 6, 7
    for state, (low, high, after) in following.items():
        table[state, low : high + 1] = after
    return table, np.array([0, 1, 2, 3, 2, 2, 3, 3], np.int32)


UTF8_NEXT, UTF8_LACKS = utf8_table()


def utf8_state(text: bytes) -> int:
    """The state after a text; a broken character resets it."""
    state = 0
    for byte in text[-4:] if len(text) > 4 else text:
        state = int(UTF8_NEXT[state, byte])
        if state < 0:
            state = max(0, int(UTF8_NEXT[0, byte]))
    return state


def permitted(steps: Steps, utf8_B, left_B):
    """bool [B, V]: the mask of ids that may be generated, with `left` bytes to go."""
    alphabet = steps.alphabet
    eos, after = alphabet.eos, alphabet.size - alphabet.offset - BYTES
    allowed_1V = jnp.asarray(alphabet.writable())[None]
    allowed_BV = jnp.broadcast_to(allowed_1V, (utf8_B.shape[0], alphabet.size))
    if not steps.valid_utf8:
        return allowed_BV
    next_B256 = jnp.asarray(UTF8_NEXT)[utf8_B]
    needs_B256 = 1 + jnp.asarray(UTF8_LACKS)[next_B256]
    fits_B256 = (next_B256 >= 0) & (needs_B256 <= left_B[:, None])
    # A text may end only between characters, unless the bytes left are too few to complete one:
    # then no byte would be permitted, and EOS is.
    ends_B1 = (utf8_B == 0)[:, None] | ~fits_B256.any(axis=1, keepdims=True)
    ends_BV = jnp.pad(ends_B1, ((0, 0), (eos, alphabet.offset - eos - 1)))
    return jnp.pad(jnp.concatenate([ends_BV, fits_B256], axis=1), ((0, 0), (0, after)))


def penalised(logits_BV, numbers: Numbers, used_BV):
    """Logits with the repetition penalty on ids that occur in the text."""
    penalty = numbers.repetition_penalty
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(used_BV, less_BV, logits_BV)


def cut_off(steps: Steps, numbers: Numbers, logits_BV):
    """Logits with -inf for ids that top-k, top-p and min-p cut off; ties go to the smaller id.

    Top-k keeps the k likeliest; top-p then the fewest of them whose mass reaches p; min-p then
    those at least p times as likely as the likeliest.
    """
    if steps.top_k or steps.top_p:
        order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        rank_1V = jnp.arange(logits_BV.shape[-1])[None]
        kept_BV = rank_1V >= 0
        if steps.top_k:
            kept_BV = rank_1V < numbers.top_k
            sorted_BV = jnp.where(kept_BV, sorted_BV, -jnp.inf)
        if steps.top_p:
            probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
            # Mass of the likelier ones: the likeliest is always kept.
            kept_BV = kept_BV & (jnp.cumsum(probs_BV, axis=-1) - probs_BV < numbers.top_p)
        rank_BV = jnp.argsort(order_BV, axis=-1)
        kept_BV = jnp.broadcast_to(kept_BV, order_BV.shape)
        logits_BV = jnp.where(jnp.take_along_axis(kept_BV, rank_BV, axis=-1), logits_BV, -jnp.inf)
    if steps.min_p:
        top_B1 = logits_BV.max(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= top_B1 + jnp.log(numbers.min_p), logits_BV, -jnp.inf)
    return logits_BV


def candidates(steps: Steps, numbers: Numbers, logits_BV, used_BV, utf8_B, left_B):
    """The logits from which an id is drawn: their softmax is its distribution (greedy: argmax)."""
    if steps.penalises:
        logits_BV = penalised(logits_BV, numbers, used_BV)
    logits_BV = jnp.where(permitted(steps, utf8_B, left_B), logits_BV, -jnp.inf)
    if not steps.random:
        return logits_BV
    return cut_off(steps, numbers, logits_BV / numbers.temperature)


def chosen(steps: Steps, logits_BV, keys_B, made_B):
    """int32 [B]: one id of each row's candidates."""
    if not steps.random:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(key, made, logits_V):
        return jax.random.categorical(jax.random.fold_in(key, made), logits_V)

    return jax.vmap(draw)(keys_B, made_B, logits_BV).astype(jnp.int32)
