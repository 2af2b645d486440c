"""Incremental decoding: exact, cached, one latent step per patch."""
