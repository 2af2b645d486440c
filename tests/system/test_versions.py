"""The bounds in pyproject.toml: complete, checked where possible, and named when violated."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bltjax.__main__ import main
from bltjax.system import versions

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
from oldest import constraints  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
LINES = [*PROJECT["dependencies"], *(line for lines in EXTRAS for line in lines)]
REQUIREMENTS = [each for each in map(Requirement, LINES) if each.name != "bltjax"]


def test_every_dependency_has_two_bounds():
    for requirement in REQUIREMENTS:
        signs = sorted(each.operator for each in requirement.specifier)
        assert signs == ["<", ">="], requirement


def test_what_is_installed_here_lies_within_the_bounds():
    for requirement in REQUIREMENTS:
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # of an extra
        assert requirement.specifier.contains(installed), (requirement, installed)


def test_oldest_versions_are_the_lower_bounds():
    found = dict(line.split("==") for line in constraints(PROJECT))
    assert found.keys() == {each.name for each in REQUIREMENTS}
    for requirement in REQUIREMENTS:
        lower = next(each for each in requirement.specifier if each.operator == ">=")
        assert found[requirement.name] == lower.version


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        (["numpy<3"], "'numpy<3' has no lower bound"),
        (["jax>=0.1", "jax[tpu]>=0.2"], "jax has two lower bounds: 0.1 and 0.2"),
    ],
)
def test_bounds_that_say_nothing_are_refused(dependencies, message):
    with pytest.raises(ValueError) as raised:
        constraints({"name": "x", "dependencies": dependencies})
    assert message in str(raised.value)


@pytest.fixture
def forgotten():
    """The warning is logged once per process."""
    versions.warn_outside_bounds.cache_clear()
    yield
    versions.warn_outside_bounds.cache_clear()


BOUNDS = [
    "numpy<1.0,>=0.5",
    "jax>=0.1",
    "orbax-checkpoint>=99; python_version >= '3.11'",
    "absl-py>=99; extra == 'tpu'",
    "not-installed-here>=1",
    "flax>=99; sys_platform == 'no such'",
]


def test_one_line_names_what_was_not_tested(forgotten, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(metadata, "requires", lambda name: BOUNDS)
    for _ in range(2):
        main(["corpus", "--records", str(tmp_path)])
    lines = [line for line in capsys.readouterr().err.splitlines() if "tested" in line]
    numpy, orbax = metadata.version("numpy"), metadata.version("orbax-checkpoint")
    assert lines == [
        f"not tested with numpy {numpy} (tested: <1.0,>=0.5);"
        f" orbax-checkpoint {orbax} (tested: >=99)"
    ]


def test_load_says_so_too(forgotten, monkeypatch, caplog, tmp_path):
    import bltjax

    monkeypatch.setattr(metadata, "requires", lambda name: BOUNDS)
    monkeypatch.setattr(versions.logger.parent, "propagate", True)
    with pytest.raises(ValueError):
        bltjax.load(tmp_path / "nothing")
    assert "not tested with numpy" in caplog.text


def test_silent_where_all_is_well_or_nothing_is_known(forgotten, monkeypatch, caplog):
    monkeypatch.setattr(versions.logger.parent, "propagate", True)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    for requires in (missing, lambda name: None, lambda name: ["numpy>=1.0", "?", "jax>=0.1"]):
        versions.warn_outside_bounds.cache_clear()
        monkeypatch.setattr(metadata, "requires", requires)
        versions.warn_outside_bounds()
    assert not caplog.text


def test_it_costs_a_few_milliseconds():
    """In a Python of its own, for packaging is imported."""
    code = (
        "import sys, time; from bltjax.system import versions; started_at = time.perf_counter();"
        " versions.warn_outside_bounds(); took = time.perf_counter() - started_at;"
        " assert 'jax' not in sys.modules; print(took)"
    )
    times = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        times.append(float(run.stdout))
    assert min(times) < 0.1, times
