"""Measures of models that compare across patchings and tokenizers."""
