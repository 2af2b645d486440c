"""Requests to a decoder, checked before any device is touched.

All checks that need no model are here: numbers in their ranges, stop strings, prompts that fit into
the context, and whether a model of a config can decode at all.
"""

from collections.abc import Sequence

from bltjax.config.model import ModelConfig
from bltjax.families import family_of
from bltjax.inference.decoding.sampling import BYTES, GREEDY, Sampling
from bltjax.text.alphabet import as_bytes
from bltjax.text.vocabulary import Vocabulary, vocabulary_of

CONTEXT = 32768  # bytes, prompt and text together
BLT_VOCABULARY = vocabulary_of("blt")
MOST_SEED = 2**31  # seeds of rows are int32


def check_decodable(config: ModelConfig, has_byte_lm: bool, draft: int) -> None:
    """Checks that a model of this config can generate.

    Raises:
      ValueError: for patches that can't be placed during generation, for entropy patches without
        a byte LM, and for drafts of a model without patches.
    """
    if draft < 0:
        raise ValueError(f"draft is {draft}, not >= 0")
    family, patching = family_of(config), config.patching
    family.require("decoding")
    if draft and "draft" in family.verbs:
        raise ValueError(family.verbs["draft"])
    if patching is None:
        return
    if patching.mode == "bpe":
        raise ValueError(
            "bpe patching can't generate: where a token ends depends on text that is not written"
            " yet (paper 2.4). Use it for training, evaluation and pictures."
        )
    if not patching.incremental:
        raise ValueError(
            "patching.looks_past_end is False, as the transformers port has it: whether a patch"
            " begins after a text's last byte would depend on there being no other byte. Use the"
            " released behaviour: `convert` again without --as_port"
        )
    if patching.mode == "entropy" and not has_byte_lm:
        raise ValueError("entropy patching needs a byte LM to generate: there is none")


def prompt_names(count: int, names: Sequence[str] = ()) -> list[str]:
    """Names of the prompts in errors: as given, or by number."""
    return [*names] or [f"prompt {number}" for number in range(1, count + 1)]


def fitting_prompts(
    prompts: Sequence[str | bytes],
    *,
    max_bytes: int,
    context: int,
    draft: int = 0,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str | bytes] = (),
    truncate: bool = False,
    names: Sequence[str] = (),
    vocabulary: Vocabulary = BLT_VOCABULARY,
) -> list[bytes]:
    """The bytes of prompts, truncated if requested; arguments are those of `Decoder.generate`.

    names: of the prompts in errors, such as the file and line. vocabulary: the model's.

    Raises:
      ValueError: for a number out of range, or a prompt that is too long for the context.
    """
    if context < 1:
        raise ValueError(f"context is {context}, not >= 1")
    if max_bytes < 0:
        raise ValueError(f"max_bytes is {max_bytes}, not >= 0")
    if draft and sampling != GREEDY:
        raise ValueError(
            "drafts are verified greedily: sampling, a penalty or a constraint would need the"
            " draft's distribution at every byte. Use draft 0, or temperature 0 alone"
        )
    alphabet = vocabulary.alphabet
    if sampling.valid_utf8 and (alphabet.eos is None or alphabet.texts != BYTES):
        raise ValueError(
            "valid_utf8 is for models of bytes with an EOS, which ends a text that has no room for"
            " a whole character"
        )
    for prompt, name in zip(prompts, prompt_names(len(prompts), names), strict=True):
        if not as_bytes(prompt) and alphabet.bos is None:
            raise ValueError(f"{name} is empty, and this model has no BOS to begin a text with")
    stops = [as_bytes(text) for text in stop]
    if not all(stops):
        raise ValueError("a stop string is empty: it would stop every text before its first byte")
    if cut := [text for text in stops if sampling.valid_utf8 and text[0] & 0xC0 == 0x80]:
        raise ValueError(
            f"stop string {cut[0]!r} begins inside a character: stopping there would leave the"
            " broken text that valid_utf8 is to prevent"
        )
    if not 0 <= seed <= MOST_SEED - len(prompts):
        raise ValueError(f"seed is {seed}, not between 0 and {MOST_SEED} less {len(prompts)} rows")
    texts, room = [], context - max_bytes
    for prompt, name in zip(prompts, prompt_names(len(prompts), names), strict=True):
        text = as_bytes(prompt)
        if len(text) > room:
            if not truncate or room < 0:
                raise ValueError(
                    f"{name}: {len(text)} bytes and {max_bytes} to write exceed the context of"
                    f" {context} bytes: drop the prompt's beginning (truncate) or take a larger"
                    " one, if the model has positions for it"
                )
            text = text[len(text) - room :]
        texts.append(text)
    return texts
