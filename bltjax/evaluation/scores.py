"""Bits per byte of a model in memory, or its family's own measure: on documents, on batches, on a
source."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.model import ModelConfig
from bltjax.config.run import MeshConfig
from bltjax.configured import (
    batch_logits,
    check_mesh,
    check_predicts,
    measure_of,
    model_shapes,
    module_of,
    resolved,
    rows_of,
    vocabulary,
)
from bltjax.data.batches import Batch
from bltjax.data.pipeline import held_out_batches
from bltjax.data.records import Document
from bltjax.distributed.processes import compile_in_lockstep, is_primary
from bltjax.distributed.rows import to_global
from bltjax.distributed.sharding import make_mesh, replicated, row_sharding, tree_shardings, under
from bltjax.family import Model
from bltjax.inference.entropy import PREVIEW, device_of, scored_source, scorer_of
from bltjax.inference.finite import not_finite
from bltjax.model.loss import BITS_PER_BYTE, Measure, Sums, key_of, target_sums
from bltjax.progress import Progress
from bltjax.system.compiling import CompileTime
from bltjax.text.vocabulary import Vocabulary

logger = logging.getLogger("bltjax")
ROW_BYTES = 2**16  # per device and batch
NO_SUMS = Sums(0.0, 0.0, 0.0, 0.0)


def mesh_words(config: MeshConfig) -> str:
    """A mesh in the form of --mesh: data=2,fsdp=4."""
    sizes = dataclasses.asdict(config).items()
    return ",".join(f"{axis}={size}" for axis, size in sizes if size != 1) or "data=1"


def evaluation_mesh(
    config: ModelConfig, asked: MeshConfig | None = None, devices: Sequence | None = None
) -> Mesh:
    """The requested mesh, or the one of all devices that splits the parameters most.

    As many devices split the parameters as divide them; the rest share the rows (`data`).

    Raises:
      ValueError: if the request doesn't fit the devices or the model, with meshes that do.
    """
    devices = jax.devices() if devices is None else devices
    shapes, count = model_shapes(config), len(devices)

    def made(sizes: MeshConfig) -> Mesh:
        mesh = make_mesh(sizes, devices)
        check_mesh(config.model, None, mesh)
        tree_shardings(shapes, mesh)
        return mesh

    refused = None
    for fsdp in (size for size in range(count, 0, -1) if count % size == 0):
        sizes = MeshConfig(count // fsdp, fsdp, 1)
        try:
            default = made(sizes)
            break
        except ValueError as error:
            refused = refused or error
    if asked is None:
        if refused:
            logger.info("evaluating on mesh %s, since %s", mesh_words(sizes), refused)
        return default
    way_out = f"--mesh={mesh_words(sizes)} works here, and is the default"
    known = (asked.data, asked.fsdp, asked.tensor)
    product = math.prod(known)
    if product > 0 and product != count:
        raise ValueError(
            f"--mesh={mesh_words(asked)}: data x fsdp x tensor = {' x '.join(map(str, known))} ="
            f" {product}, but there are {count} devices; {way_out}"
        )
    try:
        return made(asked)
    except ValueError as error:
        raise ValueError(f"--mesh={mesh_words(asked)}: {error}; {way_out}") from None


def jitted_scores(model, shardings, mesh: Mesh):
    """Jitted (params, batch) -> Sums for evaluation, replicated on every process.

    shardings: of the parameters.
    """

    accuracy = bool(measure_of(model.config).accuracy)

    def scores(params, batch) -> Sums:
        return target_sums(batch_logits(model, params, batch), batch, accuracy)

    return jax.jit(
        under(mesh, scores),
        in_shardings=(shardings, row_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def held_out_sums(scores, params, batches, sharding) -> Sums:
    """The sums over all batches, as numbers of Python."""
    total = NO_SUMS
    for batch in batches:
        total = added(total, jax.device_get(scores(params, to_global(batch, sharding))))
    return total


def added(total: Sums, sums: Sums) -> Sums:
    """A total of numbers, and a batch's sums."""
    return Sums(
        *(a if b is None else (a or 0.0) + float(b) for a, b in zip(total, sums, strict=True))
    )


class Evaluation(NamedTuple):
    """Scores of a model on a text."""

    bits_per_byte: float | None  # None where `measure` is something else
    text_bytes: int  # that were predicted
    documents: int
    cuts: int  # cuts in documents longer than a row
    measure: str = BITS_PER_BYTE.name  # what `bits` are of
    bits: float | None = None
    accuracy: float | None = None  # of the targets, by models whose measure is of these
    targets: int | None = None

    def report(self, measure: Measure) -> dict:
        """The scores as JSON, under the name of their measure."""
        common = {"text_bytes": self.text_bytes, "documents": self.documents, "cuts": self.cuts}
        if measure == BITS_PER_BYTE:
            return {"bits_per_byte": self.bits_per_byte} | common
        found = {"measure": measure.name, measure.key: self.bits}
        if self.accuracy is not None:
            found |= {key_of(measure.accuracy): self.accuracy, "targets": self.targets}
        return found | common


def evaluate_documents(
    model: Model, documents: Sequence[Document], name: str, mesh: Mesh
) -> Evaluation:
    """Bits per byte of documents, which have entropies if the model's patches need them; or the
    measure of the model's family.

    model: its parameters lie on the mesh, according to `tree_shardings`. name: the text's name in
    errors.

    Raises:
      FloatingPointError: for a result that is not finite, naming the parameter or the text.
    """
    config, params, compiling = model.config, model.params, CompileTime()
    rows = rows_of_a_batch(config.max_bytes, mesh)
    data = DataConfig(batch_size=rows, seq_len=config.max_bytes, max_patches=config.max_patches)
    batches, cuts = held_out_batches(documents, data, rows_of(config))
    shardings = tree_shardings(model_shapes(config), mesh)
    module = module_of(resolved(config, mesh.devices.flat[0]))
    scores = compile_in_lockstep(jitted_scores(module, shardings, mesh))

    def sums_of(batch: Batch) -> Sums:
        return jax.device_get(scores(params, to_global(batch, row_sharding(mesh))))

    total, measure = NO_SUMS, measure_of(config)
    progress = Progress("evaluating", len(batches), " batches", quiet=not is_primary())
    for batch in batches:
        before = compiling.seconds
        sums = sums_of(batch)
        if not np.isfinite(sums.nats):
            broken = broken_row(batch, sums_of, vocabulary(config))
            raise not_finite(f"{name}: the log-probabilities of {broken} are", {"": params})
        total = added(total, sums)
        progress.started_at += compiling.seconds - before  # the rate counts all that ran
        progress.advance(1)
    if not total.weight:
        raise ValueError(
            f"{name}: nothing to predict in its {len(documents)} documents: the {measure.name} of"
            " 0 targets are none"
        )
    bits, counts = float(measure.bits(total)), (int(total.text_bytes), len(documents), cuts)
    if measure == BITS_PER_BYTE:
        return Evaluation(bits, *counts, bits=bits)
    accuracy, targets = None, None
    if measure.accuracy:
        accuracy, targets = total.correct / max(total.weight, 1.0), int(total.weight)
    return Evaluation(None, *counts, measure.name, bits, accuracy, targets)


def rows_of_a_batch(max_bytes: int, mesh: Mesh) -> int:
    """Rows that the devices divide, about ROW_BYTES per device; the result doesn't depend on it."""
    rows = max(1, ROW_BYTES // max_bytes)
    if mesh.devices.flat[0].platform == "cpu":
        return -(-min(8, rows) // mesh.size) * mesh.size
    return rows * mesh.size


def broken_row(batch: Batch, sums_of: Callable[[Batch], Sums], words: Vocabulary) -> str:
    """The first row of a batch whose sums are not finite, by its first bytes of text."""
    for row in range(len(batch.documents_BN)):
        alone = jax.tree.map(np.zeros_like, batch)
        for mine, array in zip(alone, batch, strict=True):
            mine[row] = array[row]
        if not np.isfinite(sums_of(alone).nats):
            ids = batch[0][row][batch[1][row] > 0]
            text = words.decode(ids)[:PREVIEW].decode("utf-8", errors="replace")
            return f"the text that begins with {text!r}"
    return "some texts together"


def evaluate_model(
    model: Model, source: SourceConfig | str, devices: Sequence | None = None
) -> Evaluation:
    """Bits per byte of a loaded model on a source.

    devices: to split it over; None: a device that its parameters lie on.

    Raises:
      ValueError: for a source that can't be read, or entropy patching without a byte LM.
      FloatingPointError: for a result that is not finite, naming the parameter or the text.
    """
    check_predicts(model.config)
    vocabulary(model.config)
    source = source if isinstance(source, SourceConfig) else SourceConfig(str(source))
    documents = scored_source(source, model.config.patching, scorer_of(model))
    devices = [device_of(model.params)] if devices is None else list(devices)
    mesh = evaluation_mesh(model.config, devices=devices)
    params = jax.device_put(model.params, tree_shardings(model_shapes(model.config), mesh))
    return evaluate_documents(model._replace(params=params), documents, source.path, mesh)
