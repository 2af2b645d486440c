"""The notebook: as committed, and (slow) executed from its first cell to its last."""

import ast
import base64
import json
import re
import time
from pathlib import Path

import pytest

import bltjax

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"


def cells(kind: str) -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_committed_without_outputs():
    assert NOTEBOOK.stat().st_size < 60_000
    for cell in cells("code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell["metadata"]) <= {"cellView"}, cell["metadata"]


def test_cells_are_short_and_explained():
    kinds = [cell["cell_type"] for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    assert kinds[0] == kinds[-1] == "markdown"
    assert max(len(cell["source"]) for cell in cells("code")) <= 50


def test_its_commands_are_those_of_the_launchers():
    """Every file that a cell names exists, and every verb."""
    from bltjax.__main__ import VERBS

    text = "\n".join(
        "".join(cell["source"]) for kind in ("code", "markdown") for cell in cells(kind)
    )
    named = re.findall(r"\b(?:launch|configs)/\w+\.(?:sh|py|ipynb)", text)
    assert len(named) >= 5
    assert not [name for name in named if not (ROOT / name).exists()]
    assert re.findall(r'"bltjax",\s*"(\w+)"', text) == ["convert"] and "convert" in VERBS


def plain_python(source: str) -> ast.Module:
    """A cell without the lines that are IPython's."""
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def test_it_uses_what_the_library_exports_and_nothing_else():
    imported, used = [], set()
    for cell in cells("code"):
        for node in ast.walk(plain_python("".join(cell["source"]))):
            if isinstance(node, ast.Import):
                imported += [name for name in node.names if name.name.startswith("bltjax")]
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("bltjax"), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bltjax":
                used.add(node.attr)
    assert [(name.name, name.asname) for name in imported] == [("bltjax", None)]
    assert used >= {"load", "load_config", "patch", "threshold", "train"}
    assert used <= set(bltjax.__all__)


def test_install_fits_the_runtime(monkeypatch, tmp_path):
    """`accelerator` of the notebook, with the programs and variables of each runtime."""
    (source,) = [
        "".join(cell["source"]) for cell in cells("code")
        if "def accelerator" in "".join(cell["source"])
    ]  # fmt: skip
    functions = source[: source.index("\nruntime, here")]
    scope: dict = {}
    exec(compile(ast.parse(functions), "colab", "exec"), scope)
    monkeypatch.setattr(scope["glob"], "glob", lambda pattern: [])
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("COLAB_TPU_1VM", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    assert scope["accelerator"]() == "cpu"
    driver = tmp_path / "nvidia-smi"
    for version, expected in (("580.65.06", "gpu"), ("550.54.15", "gpu_cuda12"), ("", "cpu")):
        driver.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 9\n")
        driver.chmod(0o755)
        assert scope["accelerator"]() == expected
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    assert scope["accelerator"]() == "tpu"
    extras = (ROOT / "pyproject.toml").read_text()
    for extra in ("tpu", "gpu", "gpu_cuda12", "quickstart"):
        assert re.search(rf"^{extra} = ", extras, re.MULTILINE), extra


@pytest.mark.slow
def test_run_all(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    # A checkout whose runs/ is its own.
    for name in ("bltjax", "configs", "launch", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    started_at = time.monotonic()
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    print(f"the notebook took {time.monotonic() - started_at:.0f} s")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "the same logits: yes" in printed
    assert "patch boundaries, 0 differ" in printed and "destination by transformers" in printed
    assert "Traceback" not in printed
    shown = [output["data"] for output in outputs if "data" in output]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert len(pages) == 4 and all(page.count("<span") > 20 for page in pages)
    pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert len(pictures) == 6
    for number, picture in enumerate(pictures):  # pytest keeps them for inspection
        (tmp_path / f"colab_{number}.png").write_bytes(picture)
