"""Time and peak memory of importing released weights: the 1B's shapes, with made-up numbers."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from etils import epath

from bltjax.config.arguments import local_path_argument
from bltjax.configured import leaf_shapes, load_config, model_config
from bltjax.progress import duration, quantity
from bltjax.weights.lazy import DTYPES, Tensor
from bltjax.weights.released.hf import port_settings
from bltjax.weights.released.mapping import PARTS, PORT
from bltjax.weights.released.tensors import tensor_shapes
from bltjax.weights.safetensors import write_folder


def made_up(shape: tuple[int, ...], noise: np.ndarray) -> Tensor:
    row = int(np.prod(shape[1:], dtype=np.int64))

    def read(begin: int, end: int) -> np.ndarray:
        return np.resize(noise, (end - begin) * row).reshape(end - begin, *shape[1:])

    return Tensor(shape, noise.dtype, read, "made up")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    blt, byte_lm = "configs/blt.py:1b", "configs/byte_lm_100m.py"
    parser.add_argument("--config", default=blt, help=f"the BLT's (default: {blt})")
    parser.add_argument("--byte_lm", default=byte_lm, help=f"its byte LM's (default: {byte_lm})")
    parser.add_argument(
        "--folder",
        type=local_path_argument,
        help="a folder with room (default: the system's own)",
    )
    parser.set_defaults(run=benchmark_convert)


def benchmark_convert(args: argparse.Namespace) -> tuple[dict, str]:
    """Writes a folder of the transformers port with made-up weights, and times its import."""
    run, lm = (model_config(load_config(path)) for path in (args.config, args.byte_lm))
    dtype = DTYPES["bfloat16"]
    shapes = tensor_shapes(PARTS["blt"](PORT, run.model), leaf_shapes(run))
    shapes |= tensor_shapes(PARTS["byte_lm"](PORT, lm.model), leaf_shapes(lm))
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(dtype)
    tensors = {name: made_up(shape, noise) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bltjax-convert-") as room:
        source, out = Path(room) / "source", Path(room) / "out"
        source.mkdir()
        write_folder(epath.Path(source), tensors, lambda _: None)
        (source / "config.json").write_text(
            json.dumps(port_settings(run, lm, dtype.name)), encoding="utf-8"
        )
        started_at = time.perf_counter()
        command = [sys.executable, "-m", "bltjax", "convert", str(source), str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started_at
    sizes = [tensor.bytes for tensor in tensors.values()]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = {"bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}
    result |= {"seconds": seconds, "peak_bytes": peak}
    return result, (
        f"{quantity(sum(sizes))}B, the largest tensor {quantity(max(sizes))}B:"
        f" {duration(seconds)}, peak memory {quantity(peak)}B"
    )
