"""BLT: local encoder, latent transformer, local decoder; and its incremental decoding."""
