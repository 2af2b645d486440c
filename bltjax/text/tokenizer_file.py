"""The contents of a Hugging Face tokenizer.json: checked, and changed so that no text is lost.

    normalizer ──► added tokens ──► pre-tokenizer ──► model (BPE) ──► post-processor
    ▁ for spaces   cut out first     cuts into words    merges          BOS and EOS

Only the pre-tokenizer and the model are left to the library; the rest is done, or left out, by
text/tokens.py.
"""

import hashlib
import json

SPACE = "▁"


def identity_of(values: dict) -> str:
    """A hash of a file's contents, however they are laid out in it."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checked(values: dict, where: str) -> dict:
    """The contents of a file in the library's own spelling, with all fields.

    Raises:
      ValueError: for what is no tokenizer, or one whose pieces don't join to bytes.
    """
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ValueError("a BPE model needs tokenizers: pip install 'bltjax[bpe]'") from None
    file = values
    try:
        values = json.loads(Library.from_str(json.dumps(values)).to_str())
    except Exception as error:  # it raises plain Exception
        raise ValueError(
            f"{where} is not a tokenizer file of Hugging Face's tokenizers (tokenizer.json):"
            f" {error}"
        ) from None
    model = values["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{where} is a tokenizer of type {model['type']!r}; supported: 'BPE'")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise ValueError(f"{where}: {name} is {model[name]!r}; supported: none")
    names = [one["type"] for one in parts_of(values["pre_tokenizer"])]
    if "ByteLevel" not in names and not model["byte_fallback"]:
        raise ValueError(
            f"{where} can't spell every text: it has neither the pre-tokenizer ByteLevel nor"
            f" byte_fallback (pre-tokenizer {', '.join(names) or 'none'}, byte_fallback False)"
        )
    read = {token["content"]: token["id"] for token in values["added_tokens"]}
    for token in file.get("added_tokens") or ():
        if token["id"] != read[token["content"]]:
            raise ValueError(
                f"{where}: token {token['content']!r} has id {token['id']}, but is added as"
                f" {read[token['content']]}: the ids of added tokens follow those of the vocabulary"
            )
    return values


def check_normalizer(normalizer: dict | None, spaced: bool, where: str) -> None:
    """Raises ValueError for a normalizer that changes a text, or might; NFC is left out instead."""
    for one in parts_of(normalizer):
        if not (one["type"] == "NFC" or (spaced and (writes_spaces(one) or adds_space(one)))):
            raise ValueError(
                f"{where} changes texts (normalizer {one['type']}), whose bytes would be lost"
            )


def lossless(values: dict):
    """The library's tokenizer, for a text that has its ▁ already."""
    from tokenizers import Tokenizer as Library

    values = json.loads(json.dumps(values))
    values |= {"truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    values["model"]["dropout"] = None
    for one in parts_of(values["pre_tokenizer"]):
        if one["type"] == "ByteLevel":
            one["add_prefix_space"] = False
        if one["type"] == "Metaspace":
            one["prepend_scheme"] = "never"
    for token in values["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False  # the spaces beside it would be lost
    library = Library.from_str(json.dumps(values))
    library.encode_special_tokens = True  # as text
    return library


def parts_of(part: dict | None) -> list[dict]:
    """The parts of a sequence of normalizers, pre-tokenizers or post-processors; or the only
    one."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    inner = next(value for name, value in part.items() if name != "type")
    return [one for child in inner for one in parts_of(child)]


def writes_spaces(rule: dict) -> bool:
    """Whether a normalizer or pre-tokenizer writes ▁ for a space."""
    if rule["type"] == "Metaspace":
        return rule["replacement"] == SPACE
    return rule["type"] == "Replace" and (rule["pattern"], rule["content"]) == (
        {"String": " "}, SPACE,
    )  # fmt: skip


def adds_space(rule: dict) -> bool:
    """Whether a normalizer or pre-tokenizer puts a ▁ before a text."""
    if rule["type"] == "Metaspace":
        return rule["prepend_scheme"] != "never"
    return rule["type"] == "Prepend" and rule["prepend"] == SPACE


def template_of(post_processor: dict | None) -> tuple[list[str], list[str]]:
    """The names of the specials that a file's template puts before a text, and after it."""
    for one in parts_of(post_processor):
        if one["type"] == "TemplateProcessing":
            names = [item.get("SpecialToken", {}).get("id") for item in one["single"]]
            middle = names.index(None) if None in names else len(names)
            return names[:middle], names[middle + 1 :]
    return [], []
