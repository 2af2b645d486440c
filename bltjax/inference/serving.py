"""An export's prefill and step as programs that run without our code.

    EXPORT/
      params/, byte_lm/params/      the arrays, as every export has them
      serving/
        serving.json                sizes, alphabet, arguments and results by name, shape and dtype
        prepare.bin                 arrays -> weights                              once
        prefill_64.bin ...          weights, ids, length -> logits, room, memory   once per prompt
        step.bin                    weights, memory, id, goes -> the same          once per byte

A program is written by `jax.export`: StableHLO for several platforms, with its calling convention.
Every argument and result is an array or a tuple of arrays, so no class of ours is needed to call
it. The weights are arguments: one set of programs serves every model of its shapes.

Shapes are fixed, and prompts padded to a few lengths. With symbolic shapes there would be one
program instead of ten, but only jax could compile it, at the first request of each length; these
compile ahead of time in any runtime that takes StableHLO, and their memory is known. Attention
over prompts is plain XLA, which exists everywhere, and not the Pallas kernels, which don't.
"""

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jax import export

from bltjax.families import family_of
from bltjax.inference.decoding.loop import when
from bltjax.inference.decoding.prefill import SHORTEST, cached_model
from bltjax.text.alphabet import BOE, BOS, BPE, EOS, OFFSET, VOCABULARY
from bltjax.weights.lazy import DTYPES
from bltjax.weights.stored import ModelFiles

FORMAT, VERSION = "bltjax serving", 1
FOLDER, MANIFEST = "serving", "serving.json"
PLATFORMS = ("cpu", "tpu")
FEWEST = 16  # patches


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """Capacity of a memory: a text's positions, BOS among them, and its patches; and the rows per
    step. A prompt is one row."""

    positions: int
    patches: int
    rows: int

    def __post_init__(self):
        if self.positions < SHORTEST:
            raise ValueError(f"--serving is {self.positions} positions, not >= {SHORTEST}")
        if not FEWEST <= self.patches <= self.positions:
            raise ValueError(
                f"--serving_patches ({self.patches}) must be from {FEWEST} to the {self.positions}"
                " positions of --serving: no patch is shorter than a byte"
            )
        if self.rows < 1:
            raise ValueError(f"--serving_rows is {self.rows}, not >= 1")

    @property
    def prompts(self) -> list[int]:
        """Lengths that prompts are padded to, BOS included."""
        lengths = [SHORTEST]
        while lengths[-1] < self.positions:
            lengths.append(min(2 * lengths[-1], self.positions))
        return lengths


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--serving",
        type=int,
        metavar="POSITIONS",
        help="also programs for a server without bltjax, for texts of this many bytes with BOS",
    )
    parser.add_argument(
        "--serving_patches", type=int, help="most patches per text (default: half of --serving)"
    )
    parser.add_argument("--serving_rows", type=int, help="texts per step (default: 1)")


def serving_from(args: argparse.Namespace) -> ServingConfig | None:
    """The ServingConfig of the command line, or None."""
    if args.serving is None:
        if args.serving_patches is not None or args.serving_rows is not None:
            raise ValueError("--serving_patches and --serving_rows are settings of --serving")
        return None
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("--serving needs flatbuffers: pip install '.[serving]'")
    patches = args.serving // 2 if args.serving_patches is None else args.serving_patches
    rows = 1 if args.serving_rows is None else args.serving_rows
    return ServingConfig(args.serving, patches, rows)


def serving_dtype(files: ModelFiles) -> np.dtype:
    """The dtype of products: that of the config, or of the stored parameters."""
    if files.config.compute_dtype != "auto":
        return np.dtype(DTYPES[files.config.compute_dtype])
    bfloat16 = all(leaf.dtype == DTYPES["bfloat16"] for leaf in files.leaves.values())
    return DTYPES["bfloat16" if bfloat16 else "float32"]


def argument_arrays(files: ModelFiles) -> list[dict]:
    """Every array that the programs need, in the order of their arguments."""
    parts = [("params", files.leaves)]
    if files.config.by_entropy and files.byte_lm:
        parts.append(("byte_lm/params", files.byte_lm.leaves))
    return [
        {"path": f"{folder}/{name.replace('/', '.')}", **described(leaf)}
        for folder, leaves in parts
        for name, leaf in sorted(leaves.items())
    ]


def described(array) -> dict:
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def nested(arrays: list[dict], values) -> dict:
    """Parameters as a tree: {"params": {...}, "byte_lm": {"params": {...}}}."""
    paths = [about["path"].replace(".", "/") for about in arrays]
    return unflatten_dict(dict(zip(paths, values, strict=True)), sep="/")


def prompt_shapes(length: int) -> tuple:
    return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, length), (1,)))


def exported(function, *shapes) -> export.Exported:
    # Unused arguments are kept, so that the manifest's order holds.
    return export.export(jax.jit(function, keep_unused=True), platforms=PLATFORMS)(*shapes)


class ServingPrograms:
    """Prepare, prefill and step of one model, over tuples of arrays."""

    def __init__(self, files: ModelFiles, config: ServingConfig):
        """Raises ValueError for a model that can't generate, as `Decoder` does."""
        model = files.config
        if reason := family_of(model).verbs.get("serving"):
            raise ValueError(reason)
        scorer = files.byte_lm and files.byte_lm.config
        self.config, self.dtype = config, serving_dtype(files)
        self.model = cached_model(model, scorer, self.dtype, implementation="xla")
        self.patched = self.model.patched
        self.arrays = argument_arrays(files)
        # An open patch may be as long as the text, unless patches have a longest.
        longest = (model.patching and model.patching.max_patch_bytes) or config.positions
        self.open_slots = min(longest + 4, config.positions)  # whole_characters adds up to three
        self.array_shapes = tuple(
            jax.ShapeDtypeStruct(about["shape"], jnp.dtype(about["dtype"])) for about in self.arrays
        )
        tree = jax.eval_shape(self.parameters, self.array_shapes)
        self.weights, self.weights_tree = jax.tree.flatten(tree)
        _, _, memory = jax.eval_shape(self.after_prompt, tree, *prompt_shapes(SHORTEST))
        leaves, self.memory_tree = jax.tree_util.tree_flatten_with_path(memory)
        self.memory = []
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            shape = (config.rows, *leaf.shape[1:])
            self.memory.append((name, jax.ShapeDtypeStruct(shape, leaf.dtype)))

    # Over trees.

    def parameters(self, arrays: tuple):
        tree = nested(self.arrays, arrays)
        return self.model.prepared(tree["params"], tree.get("byte_lm", {}).get("params"))

    def after_prompt(self, params, bytes_BN, length_B):
        if not self.patched:
            return self.predicted(params, self.model.prefill(params, bytes_BN, length_B))
        scored = self.model.score(params, bytes_BN, length_B)
        length = bytes_BN.shape[1]
        most = min(length, self.config.patches)
        few = min(length // 4, most)

        def of(patches: int):
            memory = self.model.prefill(params, scored, patches, self.open_slots)
            return self.model.grown(memory, self.config.patches, self.open_slots)

        # The latent transformer runs over slots for patches: one per four bytes is mostly enough.
        held = (scored.closed_B + (scored.open_B > 0)).max()
        memory = jax.lax.cond(held <= few, lambda: of(few), lambda: of(most))
        return self.predicted(params, memory)

    def after_byte(self, params, memory, id_B, go_B):
        memory = self.model.advance(params, memory, id_B, go_B)
        if self.patched:
            memory = when(
                memory.closes_B.any(),
                lambda memory: self.model.close(params, memory, memory.closes_B),
                memory,
            )
        return self.predicted(params, memory)

    def predicted(self, params, memory):
        logits_BV, memory = self.model.predict(params, memory)
        room_B = self.config.positions - memory.count_B
        if self.patched:
            # One slot stays free: paused rows write where their next patch will be.
            room_B = jnp.minimum(room_B, self.config.patches - 1 - memory.patches_B)
        return logits_BV, room_B, memory

    # Over tuples.

    def prepare(self, arrays: tuple) -> tuple:
        return tuple(jax.tree.leaves(self.parameters(arrays)))

    def prefill(self, weights: tuple, bytes_BN, length_B):
        params = self.weights_tree.unflatten(weights)
        logits_BV, room_B, memory = self.after_prompt(params, bytes_BN, length_B)
        return logits_BV, room_B, tuple(jax.tree.leaves(memory))

    def step(self, weights: tuple, memory: tuple, id_B, go_B):
        params = self.weights_tree.unflatten(weights)
        memory = self.memory_tree.unflatten(memory)
        logits_BV, room_B, memory = self.after_byte(params, memory, id_B, go_B)
        return logits_BV, room_B, tuple(jax.tree.leaves(memory))

    def all(self) -> Iterator[tuple[str, export.Exported]]:
        """Each program, after its name."""
        weights, memory = tuple(self.weights), tuple(leaf for _, leaf in self.memory)
        yield "prepare", exported(self.prepare, self.array_shapes)
        for length in self.config.prompts:
            yield f"prefill_{length}", exported(self.prefill, weights, *prompt_shapes(length))
        rows = (self.config.rows,)
        id_B, go_B = jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.bool_)
        yield "step", exported(self.step, weights, memory, id_B, go_B)


def write_serving(programs: ServingPrograms, folder: epath.Path) -> None:
    """Writes the programs beside the arrays of an export in `folder`; their manifest last."""
    out = folder / FOLDER
    out.mkdir()
    for name, program in programs.all():
        (out / f"{name}.bin").write_bytes(program.serialize())
    config = programs.config
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "jax": jax.__version__,
        "platforms": PLATFORMS,
        "compute_dtype": programs.dtype.name,
        "positions": config.positions,
        "patches": config.patches if programs.patched else None,
        "rows": config.rows,
        "prompts": config.prompts,
        "alphabet": {
            "size": VOCABULARY,
            "bos": BOS,
            "eos": EOS,
            "first_byte": OFFSET,
            "never_written": [BOE, BOS, BPE],
        },
        "programs": {
            "prepare": {"takes": ["arrays"], "gives": ["weights"]},
            "prefill_N": {
                "takes": ["weights", {"name": "ids", "shape": [1, "N"], "dtype": "int32"},
                          {"name": "length", "shape": [1], "dtype": "int32"}],
                "gives": ["logits", "room", "memory of one row"],
            },
            "step": {
                "takes": ["weights", "memory",
                          {"name": "id", "shape": [config.rows], "dtype": "int32"},
                          {"name": "goes", "shape": [config.rows], "dtype": "bool"}],
                "gives": ["logits", "room", "memory"],
            },
        },
        "logits": {"shape": [config.rows, VOCABULARY], "dtype": "float32"},
        "room": {"shape": [config.rows], "dtype": "int32"},
        "arrays": programs.arrays,
        "weights": [described(leaf) for leaf in programs.weights],
        "memory": [{"name": name, **described(leaf)} for name, leaf in programs.memory],
    }  # fmt: skip
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
