"""bltjax: the Byte Latent Transformer in JAX.

    import bltjax

    blt = bltjax.load("runs/quickstart/blt")      # or an export, or gs://bucket/export
    blt.config                                    # settings of both models, patching, threshold
    blt.logits(text)                              # float32 [len + 1, 260]: row i follows i bytes
    blt.entropies(text)                           # float32 [len + 1], nats
    blt.patches(text)                             # list of bytes that joins to the text
    blt.bits_per_byte(text)
    blt.cross_weights(text)                       # what slots and bytes look at, to draw
    for piece in blt.generate("A BLT has", max_bytes=200):
        print(piece, end="")

This is the whole of the promised interface; a text is str or bytes. `python -m bltjax` has the
programs.
"""

from bltjax.inference import loaded
from bltjax.system import versions

__version__ = "0.1.0"
__all__ = ["load"]


def load(path, *, mesh: str | None = None, dtype: str | None = None):
    """The model of an export or of a training run's work directory, as a `LoadedModel`.

    path: a folder, or gs://BUCKET/...
    mesh: devices to split it over: "tensor=4", or "data=2,tensor=4" for two such groups, which
    share the rows that are written; None is one device. dtype: "float32" or "bfloat16", of weights
    and of what `generate` computes; None: weights as they are stored.

    Raises:
      ValueError: naming the folder, if it holds neither or is damaged; for a mesh of more devices
        than there are.
    """

    versions.warn_outside_bounds()
    return loaded.load(path, mesh=mesh, dtype=dtype)
