"""bltjax: the Byte Latent Transformer in JAX.

    import bltjax

    config = bltjax.load_config("configs/quickstart.py:byte_lm", ["optimizer.steps=90"])
    run = bltjax.train(config, "runs/byte_lm")     # the same call resumes it
    run.losses, run.evaluations, run.page()

    blt = bltjax.load("runs/quickstart/blt")       # a run or an export, on disk or gs://BUCKET/...
    blt.logits(text)                               # float32 [len + 1, 260]: row i follows i bytes
    blt.entropies(text)                            # float32 [len + 1], nats
    blt.patches(text)                              # list of bytes that joins to the text
    blt.bits_per_byte(text)
    for piece in blt.generate("A BLT has", max_bytes=200):
        print(piece, end="")
    bltjax.evaluate(blt, "held_out/*.txt").bits_per_byte

A text is str or bytes. What is imported starts no jax before it is used. `python -m bltjax` has the
programs; bltjax/README.md has more examples.
"""

import typing

if typing.TYPE_CHECKING:
    from bltjax.attention import range_attention
    from bltjax.config.model import Patching
    from bltjax.family import Model
    from bltjax.model import BLT, ByteLM

__version__ = "0.1.0"
__all__ = [
    "BLT", "ByteLM", "Model", "Patching", "evaluate", "load", "load_config", "patch",
    "range_attention", "threshold", "train", "training_batches",
]  # fmt: skip


def load(path, *, mesh: str | None = None, dtype: str | None = None):
    """The model of an export or of a training run's work directory, as a `LoadedModel`.

        blt = bltjax.load("runs/quickstart/blt")

    path: a folder, or gs://BUCKET/...
    mesh: devices to split it over: "tensor=4", or "data=2,tensor=4" for two such groups, which
    share the rows that are written; None is one device. dtype: "float32" or "bfloat16", of weights
    and of what `generate` computes; None: weights as they are stored.

    Raises:
      ValueError: naming the folder, if it holds neither or is damaged; for a mesh of more devices
        than there are.
    """
    from bltjax.inference import loaded  # jax starts only when a model is asked for
    from bltjax.system import versions

    versions.warn_outside_bounds()
    return loaded.load(path, mesh=mesh, dtype=dtype)


def load_config(path: str, overrides: typing.Sequence[str] = ()):
    """The `RunConfig` of a config file, after overrides.

        config = bltjax.load_config("configs/quickstart.py:blt", ["optimizer.steps=90"])

    path: FILE.py[:ARGUMENT]; `configs/...` is also found where bltjax is installed. overrides:
    settings as the command line has them after `--config.`.

    Raises:
      ValueError: naming the file or the setting, and the nearest name.
    """
    from bltjax import configured

    return configured.load_config(path, overrides)


def train(config, workdir, *, resume: bool = True):
    """Trains a model in this process, with a progress bar; returns the `Run`.

        run = bltjax.train(config, "runs/blt")
        run.losses          # [(step, nats)]
        run.evaluations     # [(step, held-out bits per byte)]
        run.model           # a LoadedModel of the newest checkpoint
        run.page()          # the path of an HTML page with curves and settings

    workdir: where the run lives; what is there is resumed, or, with resume=False, refused. As for
    the command, jax's compiled programs are cached from then on, and on a CPU the C library keeps
    freed memory, unless the environment says otherwise (system/README.md).

    Raises:
      ValueError: for a workdir of another run or one in use, or data that the config cannot use.
      FloatingPointError: at a step whose loss or gradient is not finite.
      KeyboardInterrupt: when interrupted, once the state is saved.
    """
    from bltjax.system import versions
    from bltjax.training import run

    versions.warn_outside_bounds()
    return run.train_run(config, workdir, resume=resume)


def evaluate(model, source):
    """Bits per byte of a `LoadedModel` on a source: `Evaluation(bits_per_byte, text_bytes,
    documents, cuts)`.

        bltjax.evaluate(blt, "held_out/*.txt").bits_per_byte

    source: a path or pattern of text, JSON lines, Parquet or records, or a `SourceConfig`. A ByT5
    or CANINE, which is no causal model, has no bits per byte (None) but others: `bits`, of what
    `measure` names, and, of masked characters, `accuracy`.

    Raises:
      ValueError: for a source that can't be read, or a model without a head to predict with.
      FloatingPointError: for a figure that is not finite, naming the parameter or the text.
    """
    from bltjax.evaluation import scores

    devices = None if model.mesh is None else model.mesh.devices.flat
    return scores.evaluate_model(model.model, source, devices)


def patch(text: str | bytes, patching, entropies=None) -> list[bytes]:
    """The patches of a text, which join to it.

        bltjax.patch("Patches scale.", bltjax.Patching("space"))

    patching: a `Patching`. entropies: float32 [len + 1], nats, after BOS and after each byte, as
    `LoadedModel.entropies` gives them; for a patching by entropy.

    Raises:
      ValueError: for a patching by entropy without entropies, or of another length than the text's.
    """
    from bltjax.text import segments

    return segments.patches_of(text, patching, entropies)


def training_batches(config):
    """An iterator of the batches that a run of this config trains on: NamedTuples of numpy arrays
    (data/batches.py). Its state is exact: `get_state()`, `set_state(state)`.

        batch = next(bltjax.training_batches(config))
        batch.bytes_BN      # int32 [batch_size, seq_len]

    Raises:
      ValueError: for data that the config cannot use.
    """
    import dataclasses

    from bltjax.configured import check_predicts, model_config, rows_of, tokenizer_of
    from bltjax.data import pipeline
    from bltjax.families import family_of

    check_predicts(config)
    if family_of(config).rows == "tokens":
        from bltjax.data.tokenizer import with_positions

        data = with_positions(config.data, tokenizer_of(config))
        config = dataclasses.replace(config, data=data)
    model, identity = model_config(config), None
    if model.by_entropy and config.entropy_model:
        from bltjax.inference import entropy

        newline_reset = model.patching.newline_reset
        scorer = entropy.load_entropy_model(config.entropy_model, newline_reset=newline_reset)
        identity = scorer.identity
    batches = pipeline.training_batches(
        config.data, rows_of(model), seed=config.seed, streams=range(config.data.batch_size),
        sources=pipeline.training_sources(config.data, identity),
    )  # fmt: skip
    return iter(batches)


def threshold(records, mean: float) -> float:
    """The threshold in nats at which patches of a folder of records average `mean` bytes.

        byte_lm.write_records("train/*.txt", "records")
        nats = bltjax.threshold("records", 4.5)

    Raises:
      ValueError: if no threshold comes near it, or the folder holds no records.
    """
    from bltjax.data import calibrate

    return calibrate.threshold_of(records, mean)


def __getattr__(name: str):
    """Classes and functions of the rooms, imported when they are asked for."""
    match name:
        case "BLT":
            from bltjax.model import BLT as found
        case "ByteLM":
            from bltjax.model import ByteLM as found
        case "Model":
            from bltjax.family import Model as found
        case "Patching":
            from bltjax.config.model import Patching as found
        case "range_attention":
            from bltjax.attention import range_attention as found
        case _:
            raise AttributeError(f"module 'bltjax' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
