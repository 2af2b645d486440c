"""Prompts from JSON lines, and results to JSON lines, which can be resumed.

A line of prompts is a JSON string or an object with `prompt` (or `prompt_hex`, for bytes that are
not UTF-8). A line of results is that object with `text`, `finish_reason` and `log_probs`; so an
`id`, and any other key, is kept. A command that was killed leaves complete lines, and beside them a
hidden file of the settings that they depend on; with the same settings the next try writes the
rest:

    RESULTS.jsonl               complete lines, in the order of the prompts
    .RESULTS.jsonl.settings     removed when the last line is written
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from bltjax.config.arguments import local_path_argument
from bltjax.config.fields import differences
from bltjax.inference.decoding.pieces import Piece
from bltjax.system.paths import hidden_beside
from bltjax.system.storage import read_json, write_text
from bltjax.text.alphabet import as_bytes

logger = logging.getLogger("bltjax")
STDIN = "-"
OURS = ("prompt", "prompt_hex", "text", "hex", "finish_reason", "log_probs")


class Prompt(NamedTuple):
    """A prompt, its name in errors, and its JSON object."""

    text: bytes
    name: str = "the prompt"
    given: Mapping = MappingProxyType({})


def input_argument(text: str) -> str | Path:
    """The type of options that name a file, or standard input as -; ./- is a file."""
    return STDIN if text == STDIN else local_path_argument(text)


def input_name(path: str | Path) -> str:
    return "standard input" if path == STDIN else str(path)


def read_input(path: str | Path) -> bytes:
    """The bytes of a file, or for - of standard input."""
    return sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()


def no_number(text: str):
    raise ValueError(f"{text} is no number in JSON")


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSONL file, or for - of standard input.

    Raises:
      ValueError: naming the line that is neither a string nor an object with a prompt.
    """
    data, file = read_input(path), input_name(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is UTF-16: rewrite it as UTF-8")
    prompts = []
    # Lines of JSON end with \n alone: other ends of lines may stand in strings.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        name = f"{file}, line {number}"
        try:
            value = json.loads(line, parse_constant=no_number)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
            raise ValueError(f"{name}: not JSON ({error})") from None
        given = value if isinstance(value, dict) else {}
        prompt = given.get("prompt") if isinstance(value, dict) else value
        if "prompt_hex" in given:
            try:
                prompt = bytes.fromhex(given["prompt_hex"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: prompt_hex: {error}") from None
        if not isinstance(prompt, str | bytes):
            raise ValueError(f'{name}: no string, and no object with a "prompt"')
        prompts.append(Prompt(as_bytes(prompt), name, given))
    if not prompts:
        raise ValueError(f"{file} has no prompts")
    for prompt in prompts:
        if clash := [key for key in OURS[2:] if key in prompt.given]:
            logger.warning("%s: results have a %s of their own", prompt.name, ", ".join(clash))
            break  # the others, most likely, have the same keys
    return prompts


def text_fields(name: str, hex_name: str, text: bytes) -> dict:
    """The fields of a text in a result, with its bytes in hex if they are not UTF-8."""
    try:
        return {name: text.decode()}
    except UnicodeDecodeError:
        return {name: text.decode(errors="replace"), hex_name: text.hex()}


def result_line(prompt: Prompt, pieces: list[Piece]) -> str:
    """One text as a JSON line: the prompt's own object with the output added."""
    text = b"".join(piece.text for piece in pieces)
    result = {key: value for key, value in prompt.given.items() if key != "hex"}
    result |= text_fields("prompt", "prompt_hex", prompt.text)
    result |= text_fields("text", "hex", text)
    result["finish_reason"] = pieces[-1].finish_reason
    result["log_probs"] = [round(float(x), 5) for piece in pieces for x in piece.log_probs]
    line = json.dumps(result, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may have and UTF-8 may not
        return json.dumps(result, allow_nan=False)
    return line


def settings_path(out: Path) -> Path:
    return hidden_beside(out, "settings")


def begin_results(out: Path, prompts: Sequence[Prompt], settings: dict) -> int:
    """The number of results already there, of the first prompts; the rest may be appended.

    settings: all that the results depend on besides the prompts, as JSON.

    Raises:
      ValueError: for a file with other contents, and for one that has all the results.
    """
    if out.exists() and not out.is_file():
        return 0  # a pipe: nothing is kept there
    side, data = settings_path(out), out.read_bytes() if out.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]  # a killed command leaves half a line
    lines = whole.split(b"\n")[:-1]
    way_out = "remove that file, or give another --out"
    if data:
        check_same(out, lines, prompts, way_out)
        before = read_request_settings(side)
        if before is None and not whole:
            raise ValueError(f"--out={out} is there, and holds no results: {way_out}")
        if before and (changed := differences(before, settings)):
            raise ValueError(
                f"--out={out} has results of other settings (there -> here):\n  "
                + "\n  ".join(changed)
                + f"\nGive the same settings to continue it; or {way_out}."
            )
        if len(lines) == len(prompts):
            side.unlink(missing_ok=True)
            raise ValueError(
                f"--out={out} has the results of all {len(prompts)} prompts already: {way_out}"
            )
        if before is None:
            logger.warning("%s: the settings of its lines are unknown", out)
        if len(whole) < len(data):
            os.truncate(out, len(whole))
    write_text(side, json.dumps(settings) + "\n")
    return len(lines)


def read_request_settings(side: Path) -> dict | None:
    """The settings with which unfinished results were written; None if they aren't known."""
    try:
        return read_json(side)
    except (OSError, ValueError):
        return None


def check_same(out: Path, lines: Iterable[bytes], prompts: Sequence[Prompt], way_out: str) -> None:
    """Raises ValueError unless the lines of a file are results of the first prompts, in order."""
    for number, line in enumerate(lines, start=1):
        prompt = prompts[number - 1] if number <= len(prompts) else None
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        # `why` is the key of results that were written before 2026-11-28.
        ended = isinstance(found, dict) and ("finish_reason" in found or "why" in found)
        same = ended and "text" in found and prompt is not None
        if not same or found | text_fields("prompt", "prompt_hex", prompt.text) != found:
            wanted = "these prompts" if prompt is None else prompt.name
            raise ValueError(
                f"--out={out} is there, and its line {number} is no result of {wanted}: {way_out}"
            )


def finish_results(out: Path) -> None:
    """Removes the settings file of unfinished results."""
    settings_path(out).unlink(missing_ok=True)
