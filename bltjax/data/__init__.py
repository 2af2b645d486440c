"""Text to batches: sources, scored records, packing, pipeline. Starts no device."""
