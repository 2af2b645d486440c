"""Meshes: tests that need eight devices run in a process that forces them on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bltjax.__main__ import main
from bltjax.config.data import SourceConfig
from bltjax.data.sources.by_path import open_source

EIGHT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
}
FOLDER = Path(__file__).parents[1] / "eight_devices"


@pytest.mark.parametrize(
    "name", [pytest.param("decoding", marks=pytest.mark.slow), "hash_tables", "meshes", "rivals"]
)
def test_on_eight_devices(name, request):
    """The quick tests of a file, or all of them if the slow ones of this suite are requested."""
    selected = request.config.getoption("-m")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", selected, FOLDER / f"{name}.py"],
        cwd=FOLDER.parents[1],
        env=EIGHT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def eight(*words) -> None:
    words = [sys.executable, "-m", "bltjax", *map(str, words)]
    subprocess.run(words, cwd=FOLDER.parents[1], env=EIGHT, check=True)


@pytest.mark.slow
def test_evaluate_and_entropies_on_eight_devices_give_the_figures_of_one_device(runs, tmp_path):
    words = ["evaluate", f"--workdir={runs.blt}", f"--source={runs.root}/held_out.jsonl"]
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    runs.run(*words, f"--out={one}")
    eight(*words, f"--out={many}", "--mesh=fsdp=4,tensor=2")
    one, many = json.loads(one.read_text()), json.loads(many.read_text())
    assert many["bits_per_byte"] == pytest.approx(one["bits_per_byte"], abs=1e-5)
    assert many["text_bytes"] == one["text_bytes"]
    words = ["entropies", f"--byte_lm={runs.byte_lm}", f"--source={runs.root}/held_out.jsonl"]
    eight(*words, f"--out={tmp_path / 'records'}")
    one = open_source(SourceConfig(str(runs.root / "records" / "held_out")))
    many = open_source(SourceConfig(str(tmp_path / "records")))
    assert len(one) == len(many)
    for index in range(len(one)):
        np.testing.assert_allclose(many[index].entropies, one[index].entropies, atol=1e-5)


def test_a_mesh_that_does_not_fit(runs, capsys):
    for mesh, message in (
        ("fsdp=3", "= 3, but there are 1 devices"),
        ("rows=2", "'rows=2' is not AXIS=DEVICES with an axis of data, fsdp, tensor"),
    ):
        try:
            code = main(["evaluate", f"--workdir={runs.blt}", f"--mesh={mesh}"])
        except SystemExit as ended:
            code = ended.code
        assert code and message in capsys.readouterr().err
