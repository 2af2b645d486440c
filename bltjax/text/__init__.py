"""Bytes as ids, where patches begin, and n-gram hashes; once for numpy and jax."""
