"""How the two commands find a Python and make its environment: with mocks of Python.

A mock prints its version, makes an environment of mocks, and records pip's arguments.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/usr/bin/env bash
version={version}
case "$*" in
    "-c import sys"*) echo "$version" ;;
    "-c import pip") [ ! -e "$(dirname "$0")/no_pip" ] ;;
    "-m ensurepip") rm "$(dirname "$0")/no_pip" ;;
    "-m venv --clear "*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip install "*) [ ! -e "$PWD/pip_fails" ] || exit 1; echo "$*" >> "$PWD/installed" ;;
    "launch/oldest.py") echo numpy==2.0 ;;
    "-m pytest "*) echo "pytest $*" ;;
    *) cat > /dev/null; echo "python $version $*" ;;
esac
"""
TOOLS = "bash sh env dirname cat rm mkdir cp ls realpath"
SHIM = "#!/bin/sh\necho 'pyenv: python3: command not found' >&2\nexit 127\n"


@pytest.fixture
def copy(tmp_path):
    """The launch folder alone, in a folder that has spaces in its name."""
    copy = tmp_path / "a copy of it"
    shutil.copytree(ROOT / "launch", copy / "launch")
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def pythons(folder: Path, **versions: str) -> str:
    """A PATH with these Pythons, by name; one without a version doesn't start."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ruff").write_text("#!/bin/sh\n")
    (folder / "ruff").chmod(0o755)
    for name, version in versions.items():
        path = folder / name.replace("_", ".")
        path.write_text(STAND_IN.format(version=version) if version else SHIM)
        path.chmod(0o755)
    # Without the folders in which the machine's own Pythons lie.
    tools = folder.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name in TOOLS.split():
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name))
    return f"{folder}:{tools}"


def bash(copy: Path, command: str, path: str, **variables: str) -> subprocess.CompletedProcess:
    variables = {"PATH": path, "HOME": os.environ["HOME"]} | variables
    return subprocess.run(
        ["bash", "-c", command], cwd=copy, capture_output=True, text=True, env=variables
    )


SOURCE = (
    "set -euo pipefail; source launch/environment.sh test;"
    ' echo "in $VIRTUAL_ENV"; command -v python'
)


def installed(copy: Path) -> list[str]:
    file = copy / "installed"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({"python3": "3.12"}, "3.12"),
        ({"python3": "3.10", "python3_11": "3.11", "python3_13": "3.13"}, "3.13"),
        ({"python3": "2.7", "python3_13": "", "python3_12": "3.12"}, "3.12"),
        ({"python3": "3.9", "python3_12": "3.12", "python3_11": "3.11"}, "3.12"),
        ({"python3": "", "python3_13": "3.10", "python3_12": "", "python3_11": "3.11"}, "3.11"),
    ],
)
def test_the_first_python_that_will_do(copy, tmp_path, versions, chosen):
    done = bash(copy, SOURCE, pythons(tmp_path / "bin", **versions))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"making .venv with Python {chosen}",
        f"installing bltjax[test] into {copy}/.venv",
        f"in {copy}/.venv",
        f"{copy}/.venv/bin/python",
    ]
    assert f"version={chosen}" in (copy / ".venv/bin/python").read_text()


def test_a_python_that_refuses_stands_before_one_that_starts(copy, tmp_path):
    shims = pythons(tmp_path / "shims", python3="", python3_12="").split(":")[0]
    path = pythons(tmp_path / "bin", python3_12="3.12")
    done = bash(copy, SOURCE, f"{shims}:{path}")
    assert "making .venv with Python 3.12" in done.stdout, done.stderr


@pytest.mark.parametrize("script", ["test.sh", "quickstart.sh"])
@pytest.mark.parametrize("version", ["3.10", "", "2.7"])
def test_no_python_that_will_do(copy, tmp_path, script, version):
    names = dict.fromkeys(("python3_11", "python3_12", "python3_13"), "")
    path = pythons(tmp_path / "bin", python3=version, **names)
    done = bash(copy, f"bash launch/{script}", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    there = f"Python {version}" if version else "no Python that starts"
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr and there in done.stderr
    assert not (copy / ".venv").exists()


def test_installed_once_and_again_when_it_must_be(copy, tmp_path):
    path = pythons(tmp_path / "bin", python3="3.12")

    def times() -> int:
        done = bash(copy, SOURCE, path)
        assert done.returncode == 0, done.stderr
        return len(installed(copy))

    assert times() == times() == 1
    (copy / "pyproject.toml").touch()
    assert times() == 2
    # Moved: what was installed editable points to where it was.
    moved = copy.rename(tmp_path / "elsewhere")
    copy = moved
    assert times() == 3
    # Its Python was removed.
    (copy / ".venv/bin/python").unlink()
    (copy / ".venv/bin/python").symlink_to(tmp_path / "nowhere")
    assert times() == 4
    (copy / ".venv/bin/python").write_text(SHIM)
    assert times() == 5


def test_an_installation_that_was_cut_off_is_done_again(copy, tmp_path):
    path = pythons(tmp_path / "bin", python3="3.12")
    (copy / "pip_fails").touch()
    assert bash(copy, SOURCE, path).returncode == 1
    assert not list(copy.glob(".venv/.bltjax-*"))
    (copy / "pip_fails").unlink()
    (copy / ".venv/bin/no_pip").touch()  # so was the environment's making
    (copy / ".venv/kept").touch()
    done = bash(copy, SOURCE, path)
    assert done.returncode == 0 and len(installed(copy)) == 1
    assert not (copy / ".venv/bin/no_pip").exists() and (copy / ".venv/kept").exists()


def test_an_active_environment_is_taken_if_it_will_do(copy, tmp_path):
    path = pythons(tmp_path / "bin", python3="3.12", python3_13="3.13")
    pythons(tmp_path / "new/bin", python="3.11")
    pythons(tmp_path / "old/bin", python="3.10")
    (tmp_path / "none").mkdir()
    new = bash(copy, SOURCE, f"{tmp_path}/new/bin:{path}", VIRTUAL_ENV=f"{tmp_path}/new")
    assert f"in {tmp_path}/new\n" in new.stdout and not (copy / ".venv").exists()
    for name, what in (("old", "Python 3.10"), ("none", "no Python that starts")):
        shutil.rmtree(copy / ".venv", ignore_errors=True)
        old = bash(copy, SOURCE, f"{tmp_path}/{name}/bin:{path}", VIRTUAL_ENV=f"{tmp_path}/{name}")
        assert old.returncode == 0 and f"in {copy}/.venv\n" in old.stdout, old.stderr
        assert f"not in the active {tmp_path}/{name}, which has {what}" in old.stderr


def test_another_python_has_an_environment_of_its_own(copy, tmp_path):
    path = pythons(tmp_path / "bin", python3="3.12", python3_13="3.13")
    pythons(tmp_path / "active/bin", python="3.12")
    path, active = f"{tmp_path}/active/bin:{path}", {"VIRTUAL_ENV": f"{tmp_path}/active"}
    (copy / "bin").mkdir()
    shutil.copy(tmp_path / "bin/python3.13", copy / "bin/own")
    for python in ("python3.13", f"{tmp_path}/bin/python3.13", "bin/own"):
        done = bash(copy, f"bash launch/test.sh --python {python}", path, **active)
        assert done.returncode == 0, done.stderr
        assert "python 3.13 -" in done.stdout and "not slow" in done.stdout
    assert {each.name for each in copy.glob(".venv*")} == {".venv-3.13"}
    assert len(installed(copy)) == 1
    refused = bash(copy, "bash launch/test.sh --python nowhere", path, **active)
    assert refused.returncode == 2 and "nowhere is no Python that starts" in refused.stderr


def test_oldest_versions(copy, tmp_path):
    path = pythons(tmp_path / "bin", python3="3.13", python3_11="3.11")
    assert bash(copy, "bash launch/test.sh --oldest", path).returncode == 0
    folder = copy / ".venv-3.11-oldest"
    (line,) = installed(copy)
    assert f"--constraint {folder}/oldest.txt --editable .[test]" in line
    assert (folder / "oldest.txt").read_text() == "numpy==2.0\n"
    assert bash(copy, "bash launch/test.sh --oldest --python python3", path).returncode == 0
    assert (copy / ".venv-3.13-oldest").exists()


def test_all_runs_on_each_python_once(copy, tmp_path):
    first = pythons(tmp_path / "first", python3="3.12", python3_13="", python3_11="3.11")
    second = pythons(tmp_path / "second", python3_13="3.13", python3_11="3.11", python3_12="3.12")
    done = bash(copy, "bash launch/test.sh --all", f"{first.split(':')[0]}:{second}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match("==|pytest|python 3", line)]
    assert lines == [
        "python 3.12 -",
        "pytest -m pytest -n 2 --dist loadfile --no-loadscope-reorder --seed random",
        f"== Python 3.11: {tmp_path}/first/python3.11",
        "python 3.11 -",
        "pytest -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not slow",
        f"== Python 3.13: {tmp_path}/second/python3.13",
        "python 3.13 -",
        "pytest -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not slow",
    ]
    assert {each.name for each in copy.glob(".venv*")} == {".venv", ".venv-3.11", ".venv-3.13"}


def test_all_says_what_failed_and_what_is_not_there(copy, tmp_path):
    path = pythons(tmp_path / "bin", python3="3.12", python3_11="", python3_13="3.13")
    (tmp_path / "bin/python3.13").write_text(
        STAND_IN.format(version="3.13").replace('echo "pytest $*"', "exit 1")
    )
    done = bash(copy, "bash launch/test.sh --all", path)
    assert done.returncode == 1
    assert "== Python 3.11: none on PATH starts; left out" in done.stdout
    assert done.stdout.splitlines()[-1] == "failed: Python 3.13,"


@pytest.mark.parametrize(
    "words", ["--fast", "--all --smoke", "--smoke --all", "--python", "slow", "--all --all"]
)
def test_refused(words):
    done = subprocess.run(
        ["bash", "launch/test.sh", *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_supported_pythons_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = sorted(line.rpartition(" ")[2] for line in project["classifiers"])
    assert project["requires-python"] == f">={supported[0]}"
    script = (ROOT / "launch/test.sh").read_text()
    assert f"for version in {' '.join(supported)}; do" in script
    searched = re.search(
        r"for name in python3 (.*); do", (ROOT / "launch/environment.sh").read_text()
    )
    assert sorted(searched[1].split()) == [f"python{version}" for version in supported]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in supported


def test_smoke_is_a_marker(pytestconfig):
    assert any(line.startswith("smoke: ") for line in pytestconfig.getini("markers"))
