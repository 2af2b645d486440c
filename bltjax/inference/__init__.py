"""Stored models at work: scoring, entropies of corpora, generation, exported programs."""
