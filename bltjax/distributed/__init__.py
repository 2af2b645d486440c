"""Meshes and shardings; many processes as one. The only room that touches jax's private names."""
