"""A byte-level BPE tokenizer of one's own, as Llama 3's (arXiv 2407.21783).

    id   0                   1                 2 ... 257    258 ... V - 1
         <|begin_of_text|>   <|end_of_text|>   the bytes    merges, the most frequent first

The same texts and vocabulary give the same tokenizer.
"""

from collections.abc import Iterator

from bltjax.text.bpe import NOT_UTF8

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
LEAST = 256 + 2  # bytes and specials
# Words that no merge crosses: contractions, words with the character before them, numbers of up to
# three digits, other signs, line breaks, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterator[bytes], vocabulary: int):
    """A `tokenizers.Tokenizer` with `vocabulary` tokens; bytes that are not UTF-8 teach nothing.

    Raises:
      ValueError: for fewer tokens than bytes and specials, or more than the texts have merges for.
    """
    if vocabulary < LEAST:
        raise ValueError(
            f"a vocabulary of {vocabulary} tokens is smaller than {LEAST}: the 256 bytes, BOS and"
            " EOS"
        )
    try:
        from tokenizers import (
            Regex,
            Tokenizer,
            decoders,
            models,
            pre_tokenizers,
            processors,
            trainers,
        )
    except ImportError:
        raise ValueError("a tokenizer needs tokenizers: pip install 'bltjax[bpe]'") from None
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    runs = (run for text in texts for run in utf8_runs(text))
    tokenizer.train_from_iterator(runs, trainer)
    if (found := tokenizer.get_vocab_size()) < vocabulary:
        raise ValueError(
            f"the text gives {found} tokens, not {vocabulary}: give more of it, or ask for a"
            " smaller vocabulary"
        )
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


def utf8_runs(text: bytes) -> list[str]:
    """The parts of a text between bytes that are not UTF-8."""
    return [run for run in NOT_UTF8.split(text.decode(errors="surrogateescape"))[::2] if run]
