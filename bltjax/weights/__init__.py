"""Stored models: work directories, exports, and third-party layouts."""
