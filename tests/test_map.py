"""The READMEs list rooms and files in import order, leave none out, and lead to what exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from readmes import READMES, ROOT


def rooms() -> list[str]:
    """The rooms of bltjax/ in the README's order: folders, and files that stand alone."""
    section = (ROOT / "README.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    return re.findall(r"^\| \[?`(bltjax/[\w.]+?)/?`", section, re.MULTILINE)


def files_of(room: str) -> list[str]:
    """A room's files in its README's order."""
    if room.endswith(".py"):
        return [room]
    text = (ROOT / room / "README.md").read_text()
    return [f"{room}/{name}" for name in re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)]


def file_map() -> list[str]:
    """Every file of the package in import order."""
    last = ["bltjax/__main__.py", "bltjax/__init__.py"]
    return [name for room in rooms() for name in files_of(room)] + last


def imports(path: Path) -> set[str]:
    """Package files that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bltjax"):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("bltjax")]
        for name in names:
            base = name.replace(".", "/")
            for candidate in (f"{base}.py", f"{base}/__init__.py"):
                if (ROOT / candidate).is_file() and candidate != "bltjax/__init__.py":
                    found.add(candidate)
    return found


def test_map_is_complete():
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "bltjax").rglob("*.py")}
    listed = file_map()
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def test_map_is_the_import_order():
    listed = file_map()
    for place, name in enumerate(listed):
        below = imports(ROOT / name) - set(listed[:place])
        assert not below, f"{name} imports {sorted(below)}, which do not stand above it in the map"


def test_rooms_are_small():
    """A folder has 12 files at most, a file about 300 lines."""
    for folder in {path.parent for path in (ROOT / "bltjax").rglob("*.py")}:
        files = list(folder.glob("*.py"))
        assert len(files) <= 12, folder
        for path in files:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 310, f"{path} has {lines} lines"


def test_data_and_model_do_not_know_each_other():
    for path in (ROOT / "bltjax" / "data").glob("*.py"):
        assert not any("/model/" in name for name in imports(path)), path
    for path in (ROOT / "bltjax" / "model").glob("*.py"):
        assert not any("/data/" in name for name in imports(path)), path


def test_no_program_asks_which_platform_this_process_has():
    """A program may be traced for devices elsewhere: the mesh's devices decide."""
    for path in (ROOT / "bltjax").rglob("*.py"):
        assert "default_backend" not in path.read_text(), path


def test_data_starts_no_device():
    code = (
        "import bltjax.data.pipeline, bltjax.distributed.coordinator as coordinator;"
        " assert not coordinator.devices_started()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


PRIVATE = re.compile(
    r"\b(?:import|from)\s[^\n]*\b_src\b|\b(?:jax|ocp|orbax|flax|optax|grain)(?:\.\w+)*\._(?!_)\w+"
)


def test_private_names_of_libraries_stand_in_two_files():
    """A library may change them with any release: there each has its reason."""
    named = {
        str(path.relative_to(ROOT))
        for folder in ("bltjax", "launch", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if PRIVATE.search(path.read_text())
    }
    assert named == {"bltjax/distributed/coordinator.py", "tests/private_names.py"}


def test_the_readme_is_a_door():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_readme_names_exists(path):
    """Every relative link with its anchor, and every test, file and folder in backquotes."""
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        there = (path.parent / name) if name else path
        assert there.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{link}: there is no such heading"
    for name in re.findall(r"`((?:bltjax|configs|launch|tests)/[\w/.]*)", text):
        assert (ROOT / name).exists(), f"there is no {name}"
    tests = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py")}
    code = "".join(tests.values())
    for name in re.findall(r"`(test_\w+(?:\.py)?)`", text):
        assert name in tests or f"def {name}(" in code, f"there is no {name}"


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]


@pytest.mark.parametrize("folder", ["bltjax", "configs", "launch", "tests"])
def test_docstrings_begin_with_their_subject(folder):
    """A docstring that begins with "What" hides its noun."""
    for path in (ROOT / folder).rglob("*.py"):
        for text in docstrings(path):
            assert not re.match(r"What(ever)?\b", text), f"{path}: {text.splitlines()[0]}"
