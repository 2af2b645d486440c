"""Inference: scoring, entropies of corpora, generation, exported programs."""
