"""`convert --verify` of a rival's public weights: the same ids through source and result.

transformers' own model reads a public folder where it has the model and is installed; our code
reads all others. The ids are random, as many as show every kind of attention.
"""

from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from bltjax.convert.verify import our_model
from bltjax.weights.stored import ModelFiles

ROWS, LENGTH = 2, 150
# Of transformers, by family: the class of the model.
PEERS = {
    "llama": "LlamaForCausalLM", "mambabyte": "MambaForCausalLM", "canine": "CanineModel",
    "byt5": "T5ForConditionalGeneration",
}  # fmt: skip


class RivalVerdict(NamedTuple):
    """The largest difference of an output, and the implementations that computed both."""

    output: str
    difference: float
    by: tuple[str, str]


def sample_inputs(files: ModelFiles) -> dict[str, np.ndarray]:
    """Random ids, by the names of the family's public inputs."""
    random, model = np.random.default_rng(0), files.config.model
    length = min(LENGTH, files.config.max_bytes)
    if model.group == "canine":
        ids = random.integers(32, 0x3000, (ROWS, length)).astype(np.int32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids % 2}
    ids = random.integers(3, 256, (ROWS, length)).astype(np.int32)
    if model.group == "byt5":
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 20:90]}
    if model.group == "llama":
        ids = random.integers(0, model.vocabulary, (ROWS, length)).astype(np.int32)
    return {"tokens": ids, "targets": np.roll(ids, -1, axis=1)}


def output_of(files: ModelFiles, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our own outputs."""
    model = our_model(files)
    given = {name: x for name, x in inputs.items() if name in model.family.inputs}
    return model.forward(**given)


def output_of_peer(
    files: ModelFiles, folder: epath.Path, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """Those of transformers' model of a public folder; None where there is none."""
    name = PEERS.get(files.config.model.group)
    settings = files.origin.get("json", {}).get("config.json", {})
    if files.layout != "public" or name is None or "model_type" not in settings:
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    peer = getattr(transformers, name).from_pretrained(str(folder), dtype=torch.float32).eval()
    given = {name: torch.from_numpy(x).long() for name, x in inputs.items() if name != "targets"}
    if "tokens" in given:
        given = {"input_ids": given["tokens"]}
    with torch.no_grad():
        found = peer(**given)
    names = ("logits", "last_hidden_state", "pooler_output")
    return {name: found[name].numpy() for name in names if name in found}


def verify_rival(
    source: ModelFiles, source_folder: epath.Path, written: ModelFiles, folder: epath.Path
) -> RivalVerdict:
    """Runs the same ids through both, each by transformers if that has the model, else by ours."""
    inputs, outputs, by = sample_inputs(source), [], []
    with jax.default_matmul_precision("highest"):
        for files, place in ((source, source_folder), (written, folder)):
            theirs = output_of_peer(files, place, inputs)
            outputs.append(theirs or output_of(files, inputs))
            by.append("transformers" if theirs else "bltjax")
    one, other = outputs
    output = "logits" if "logits" in one else "last_hidden_state"
    difference = float(np.abs(one[output] - other[output]).max())
    return RivalVerdict(output, difference, tuple(by))
