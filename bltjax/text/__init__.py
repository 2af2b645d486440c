"""Bytes as ids, patch starts and n-gram hashes, written once for numpy and jax."""
