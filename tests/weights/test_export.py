"""Exports of a sharded run restore anywhere: one device, eight, or two processes."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from bltjax.__main__ import main
from bltjax.model.params import flattened
from bltjax.weights.export import load_params

READER = """
import sys
import jax, numpy as np
rank, port, export, expected = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from bltjax.config.run import MeshConfig
from bltjax.weights.export import load_params, read_model_config
from bltjax.distributed.sharding import make_mesh, tree_shardings
from bltjax.configured import model_shapes
from bltjax.model.params import flattened
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
shardings = tree_shardings(model_shapes(read_model_config(export)), mesh)
found = flattened(load_params(export, shardings).params)
with np.load(expected) as whole:
    for path, array in found.items():
        assert not array.is_fully_addressable
        for shard in array.addressable_shards:
            assert (np.asarray(shard.data) == whole[path][shard.index]).all(), path
print("equal", len(found))
"""


def environment(devices: int) -> dict:
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }


@pytest.fixture(scope="module")
def sharded(runs, tmp_path_factory):
    """A run of 2 x 2 x 2 devices, as an export."""
    folder = tmp_path_factory.mktemp("sharded")
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    command = [
        sys.executable, "-m", "bltjax", "train", "--config=tests/tiny.py:blt",
        f"--workdir={folder / 'run'}", *runs.blt_settings, *mesh, "--config.optimizer.steps=2",
        f"--config.data.train.text.path={runs.root}/records/train",
        f"--config.data.eval.text.path={runs.root}/records/held_out",
    ]  # fmt: skip
    subprocess.run(command, check=True, env=environment(8), capture_output=True)
    assert main(["--debug", "convert", str(folder / "run"), str(folder / "export")]) == 0
    return folder


def test_on_one_device(sharded):
    run = flattened(load_params(sharded / "run").params)
    export = flattened(load_params(sharded / "export").params)
    assert run.keys() == export.keys()
    for path, array in run.items():
        assert array.dtype == export[path].dtype and (array == export[path]).all(), path


def test_under_two_processes(sharded):
    arrays = flattened(load_params(sharded / "export").params)
    whole = sharded / "whole.npz"
    np.savez(whole, **{path: jax.device_get(array) for path, array in arrays.items()})
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        free = listener.getsockname()[1]
    commands = [
        [sys.executable, "-c", READER, str(rank), str(free), str(sharded / "export"), str(whole)]
        for rank in (0, 1)
    ]
    readers = [
        subprocess.Popen(
            command, env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    for reader in readers:
        out, error = reader.communicate(timeout=240)
        assert reader.returncode == 0 and f"equal {len(arrays)}" in out, error[-2000:]
