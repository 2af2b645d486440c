"""The READMEs of the repository, and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
READMES = sorted(
    [ROOT / "README.md"]
    + [path for part in ("bltjax", "configs", "launch", "tests")
       for path in (ROOT / part).rglob("README.md")]
)  # fmt: skip


def shown_commands(path: Path) -> list[list[str]]:
    """The words after `python -m bltjax` of each command, in a block or within a line of text."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^ {4,}(python -m bltjax [a-z](?:.*\\\n)*.*)", text, re.MULTILINE)
    found += re.findall(r"[^`]`(python -m bltjax [a-z][^`]*)`", text)
    return [shlex.split(command.replace("\\\n", " "), comments=True)[3:] for command in found]
