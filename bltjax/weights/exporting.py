"""Writes an export, a block at a time: no array is ever in memory whole."""

import json
from collections.abc import Callable

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import unflatten_dict

from bltjax.configured import run_layout, tokenizer_of, with_tokenizer
from bltjax.system.storage import refuse_pointer, write_text
from bltjax.weights import workdir as ckpt
from bltjax.weights.export import FORMAT, MANIFEST, VERSION, place_of
from bltjax.weights.lazy import BLOCK_BYTES, Leaf, blocks
from bltjax.weights.stored import ModelFiles
from bltjax.weights.workdir import TOKENIZER


def chunk_shape(shape: tuple[int, ...], index: tuple[int, ...], dtype: np.dtype) -> list[int]:
    """Chunk shape of one place, with as many of its rows as make a block."""
    inner = shape[len(index) :]
    row_bytes = int(np.prod(inner[1:], dtype=np.int64)) * dtype.itemsize
    rows = min(inner[0], max(1, BLOCK_BYTES // row_bytes))
    return [1] * len(index) + [rows, *inner[1:]]


def write_leaves(folder: epath.Path, leaves: dict[str, Leaf], written: Callable[[int], None]):
    """Writes an Orbax checkpoint of `leaves`, block by block.

    Orbax itself holds every array that it saves. So it gets stand-ins of one number each, whose
    zarr arrays are then replaced by the real ones.
    """
    ones = {path: np.zeros((1,) * len(leaf.shape), leaf.dtype) for path, leaf in leaves.items()}
    with ckpt.quiet(), ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(folder.absolute(), unflatten_dict(ones, sep="/"))
    for path, leaf in leaves.items():
        pieces = list(blocks(path, leaf))
        array = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": place_of(folder / path.replace("/", ".")),
                "metadata": {
                    "compressor": None,  # random bits of a mantissa don't compress
                    "chunks": chunk_shape(leaf.shape, pieces[0].index, leaf.dtype),
                },
            },
            create=True,
            delete_existing=True,
            dtype=leaf.dtype.name,
            shape=leaf.shape,
        ).result()
        for index, rows in pieces:
            data = leaf.read(index, rows)
            array[(*index, rows)].write(data).result()
            written(data.nbytes)


def write_export(files: ModelFiles, folder: epath.Path, written: Callable[[int], None]) -> None:
    """Writes a model, with its byte LM if it has one, as an export; the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    config = files.config
    if given := tokenizer_of(config):
        tokenizer = epath.Path(given)
        refuse_pointer(tokenizer)
        (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
        config = with_tokenizer(config, TOKENIZER)
    write_leaves(folder / "params", files.leaves, written)
    if files.byte_lm is not None:
        write_export(files.byte_lm, folder / "byte_lm", written)
    dtypes = sorted({leaf.dtype.name for leaf in files.leaves.values()})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "config": run_layout(config),
        "dtype": " and ".join(dtypes),
        "step": files.step,
        "held_out_bits_per_byte": files.bits_per_byte,
        "source": files.origin.get("layout", files.layout),
        "origin": files.origin,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
