"""From text to batches, in numpy and grain; starts no device and knows no model."""
