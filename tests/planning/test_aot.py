"""Kernels and exports compiled for absent machines: TPUs by libtpu, GPUs by jax's CUDA plugin.

Without that plugin (`pip install '.[gpu]'`; no GPU needed) they are lowered to Triton's language.

Sizes are those of the 8B: rows of 16,384 bytes, 4,096 patches, 4 slots per patch; and of CANINE:
rows of 2,048 characters.
"""

import importlib.util
import math
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from test_serving import files_of

from bltjax.attention import range_attention
from bltjax.attention.pattern import Blocks, Pooling, Reading, Sliding, Whole
from bltjax.distributed.topology import read_topology
from bltjax.inference.serving import ServingConfig, ServingPrograms
from bltjax.planning import aot

N, P, K = 16384, 4096, 4
CASES = {
    "window": (Sliding(512), N, N, 20, 20, 64),
    "pooling": (Pooling(K), P * K, N, 20, 20, 64),
    "pooling K=3": (Pooling(3), P * 3, N, 20, 20, 64),
    "reading": (Reading(K), N, P * K, 20, 20, 64),
    "latent": (Sliding(P), P, P, 32, 32, 128),
    "latent J=8": (Sliding(P), P, P, 32, 8, 128),
    "no multiples": (Sliding(100), 1000, 1040, 6, 3, 40),
    "many slots": (Pooling(31), 31 * 256, 1024, 4, 4, 64),
    "one shared head": (Sliding(1024), 1024, 1024, 16, 1, 128),
    "whole documents": (Whole(), 2048, 2048, 12, 12, 64),
    "blocks": (Blocks(128), 2048, 2048, 12, 12, 64),
}
KERNELS = ("forward_kernel", "queries_kernel", "keys_kernel")
# One kernel of all gradients, on TPUs.
LONG = ("latent", "latent J=8", "one shared head", "whole documents")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def traced(name, implementation, sharding=None, rows=1, dtype=jnp.bfloat16):
    """Value and gradients of one attention, and its arguments' shapes."""
    pattern, queries, keys, heads, shared, channels = CASES[name]

    def loss(q, k, v, start, end):
        out = range_attention(q, k, v, start, end, pattern=pattern, implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    shapes = [(queries, heads, channels), (keys, shared, channels), (keys, shared, channels)]
    arguments = [
        jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding) for shape in shapes
    ] + [jax.ShapeDtypeStruct((rows, queries), jnp.int32, sharding=sharding)] * 2
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*arguments)


@pytest.fixture
def described_gpu():
    """jax lowers a kernel for the GPU that is present, or for one that is described."""
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h100)):
        yield


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name, described_gpu):
    text = traced(name, "pallas_gpu").lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
    for kernel in KERNELS:
        assert kernel in text


def test_exact_products_are_three_of_tf32_on_cuda():
    """All products of the three kernels; bfloat16 is multiplied as it is."""
    preset = "TF32_TF32_F32_X3"
    with jax.default_matmul_precision("highest"):
        program = traced("no multiples", "pallas_gpu", dtype=jnp.float32)
        assert str(program.jaxpr).count(preset) == 2 + 3 + 4
        assert preset not in str(traced("no multiples", "pallas_gpu").jaxpr)
    with jax.default_matmul_precision(None):
        assert preset not in str(traced("no multiples", "pallas_gpu", dtype=jnp.float32).jaxpr)


@pytest.fixture(scope="module")
def no_cache():
    with aot.no_cache():
        yield


# Shared memory is what differs most: threads, registers and the rest are those of an H100.
GPU = """platform_name: "CUDA" device_description_str: "test"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{ cuda_compute_capability {{ major: {major} minor: {minor} }}
threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared} l2_cache_size: 52428800
memory_bandwidth: 3352320000000 clock_rate_ghz: 1.98 device_memory_size: 24000000000 }}"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(jnp.bfloat16, None), (jnp.float32, None), (jnp.float32, "highest")],
    ids=["bf16", "fp32", "exact fp32"],
)
@pytest.mark.parametrize(
    "capability", [(8, 0, 166912), (8, 9, 101376), (9, 0, 232448)], ids=["A100", "L4", "H100"]
)
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_cuda(name, capability, dtype, precision, no_cache):
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else []
    if not any("cuda" in module.name for module in pkgutil.iter_modules(folders)):
        pytest.skip("no CUDA plugin: pip install 'jax[cuda13]' (Linux, x86-64)")
    major, minor, shared = capability
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="one",
        topology="1x1x1",
        target_config=GPU.format(major=major, minor=minor, shared=shared),
    )
    with jax.default_matmul_precision(precision):
        program = traced(name, "pallas_gpu", SingleDeviceSharding(topology.devices[0]), dtype=dtype)
        text = program.lower().compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3


@pytest.fixture(scope="module")
def devices(no_cache):
    """From a chip's name to a device to compile for."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]' (Linux, x86-64)")

    def device(chip: str):
        return aot.described_devices(read_topology(TOPOLOGIES[chip]))[0]

    return device


def arrays(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays in a compiled program (uint8 are memory regions, not arrays)."""
    found = re.findall(r"\b(?:pred|bf16|f32|s32)\[([\d,]+)\]", text)
    return {tuple(map(int, sizes.split(","))) for sizes in found}


def check_compiles(device, name, rows=1, dtype=jnp.bfloat16):
    program = traced(name, "pallas_tpu", SingleDeviceSharding(device), rows, dtype)
    text = program.lower().compile().as_text()
    for kernel in ("forward_kernel", "gradients_kernel") if name in LONG else KERNELS:
        calls = re.findall(rf"^ .*range_attention_{kernel}\S* = .* custom-call\(", text, re.M)
        assert len(calls) == 1, kernel
    _, queries, keys, heads, _, channels = CASES[name]
    # No array is larger than what goes in, and none is queries by keys, or N by P.
    longest = -(-max(queries, keys) // 768) * 768
    for shape in arrays(text):
        assert math.prod(shape) <= rows * longest * heads * channels, shape
        assert sum(size >= min(queries, keys) for size in shape) <= 1, shape


@pytest.mark.parametrize("name", ["window", "pooling", "reading", "latent J=8", "no multiples"])
def test_compiles_for_v5e(name, devices):
    check_compiles(devices("v5e"), name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_every_chip(name, chip, dtype, devices):
    check_compiles(devices(chip), name, rows=2, dtype=dtype)


@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "fp32"])
def test_compiles_where_exact_products_are_asked_for(dtype, precision, devices):
    """fp32 is multiplied in six passes, bfloat16 in one as usual."""
    with jax.default_matmul_precision(precision):
        program = traced("window", "pallas_tpu", SingleDeviceSharding(devices("v5e")), dtype=dtype)
        assert ("Precision.DEFAULT" in str(program.jaxpr)) == (dtype == jnp.bfloat16)
        program.lower().compile()


def test_exported_programs_compile_for_v5e(devices):
    """Exported for two platforms, each is lowered for the one that runs it."""
    sharding = SingleDeviceSharding(devices("v5e"))
    programs = dict(ServingPrograms(files_of("newline"), ServingConfig(64, 32, 2)).all())
    assert sorted(programs) == ["prefill_64", "prepare", "step"]
    for program in programs.values():
        read = export.deserialize(program.serialize())
        arguments, _ = read.in_tree.unflatten(
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
            for aval in read.in_avals
        )
        compiled = jax.jit(read.call).lower(*arguments).compile()
        assert compiled.memory_analysis().peak_memory_in_bytes < 2**23
