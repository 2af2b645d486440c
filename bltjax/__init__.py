"""bltjax: the Byte Latent Transformer in JAX."""

__version__ = "0.1.0"
