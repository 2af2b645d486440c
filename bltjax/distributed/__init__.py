"""Meshes, shardings and many processes. The only room that touches jax's private names."""
