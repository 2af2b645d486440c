"""Meshes: what needs eight devices runs in a process that forces them on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "eight_devices"


@pytest.mark.parametrize("name", ["decoding", "hash_tables", "meshes"])
def test_on_eight_devices(name, request):
    """The quick tests of a file; all of them if the slow ones of this suite are asked for."""
    selected = request.config.getoption("-m")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", selected, FOLDER / f"{name}.py"],
        cwd=FOLDER.parents[1],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8"
            " --xla_backend_optimization_level=0",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
