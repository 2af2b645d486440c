"""Compiling for absent TPUs: their devices as described by libtpu, and a program's memory on one of
them.

libtpu (the extra `tpu`; Linux on x86-64) compiles on any machine for any topology. It is configured
not to look for a TPU, and to allow other processes to compile as well.
"""

import contextlib
import importlib.util
import os
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from bltjax.distributed.messages import says
from bltjax.distributed.topology import Topology

# Without the last two libtpu complains of a TPU that it can't find.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(Exception):
    """A program that the compiler refuses, since it needs more memory than a chip has."""

    def __init__(self, needed: float):
        super().__init__(f"needs {needed / 2**30:.2f} GiB")
        self.needed = needed  # bytes, if the compiler reports them


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of main memory on one chip; `activations` include gradients, the batch and code."""

    parameters: float
    optimizer: float
    total: float
    capacity: float

    @property
    def activations(self) -> float:
        return max(0.0, self.total - self.parameters - self.optimizer)

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def described_devices(topology: Topology) -> list:
    """The devices of a topology, for a mesh and for compiling.

    Raises:
      ValueError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for a TPU needs libtpu, which is not installed: pip install -e '.[tpu]'"
            " (Linux on x86-64; no TPU is needed)"
        )
    options = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chips < topology.chip.host_chips:
        options["chips_per_host_bounds"] = (*topology.sides, 1)[:3]
    missing = SURROUNDINGS.keys() - os.environ.keys()
    os.environ.update({name: SURROUNDINGS[name] for name in missing})
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    finally:
        for name in missing:  # the processes that this one starts aren't on a TPU
            del os.environ[name]


def device_coords(topology: Topology, devices) -> np.ndarray:
    """int [devices, 1 + sides]: the slice of each, and its coordinates there."""
    sides = len(topology.sides)
    return np.array([(getattr(x, "slice_index", 0), *x.coords[:sides]) for x in devices])


@contextlib.contextmanager
def no_cache():
    """Disables the compilation cache: a program for an absent machine can't be read back from
    it."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_ahead(lowered):
    """The compiled program.

    Raises:
      TooLarge: if it doesn't fit a chip's memory.
    """
    try:
        with no_cache():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = says(error, "larger than a chip")
        if not found:
            raise
        raise TooLarge(float(found[1]) * UNITS[found[2]]) from None


def used_bytes(compiled) -> float:
    """Main memory of a running program on a chip, its own code included."""
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def shard_bytes(shapes, shardings) -> float:
    """Bytes of a tree on one device."""
    sizes = jax.tree.map(
        lambda leaf, sharding: np.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        shapes,
        shardings,
    )
    return float(sum(jax.tree.leaves(sizes)))
