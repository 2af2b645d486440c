"""Weights wherever they are stored, read and written in pieces: no model is ever held whole."""
