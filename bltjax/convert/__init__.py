"""Conversion between released weights and exports, and integrity checks of any folder."""
