"""Documents of text, JSON lines, Parquet, TensorFlow Datasets and records, by their path."""
