"""Measures that compare models across patchings and tokenizers."""
