"""Stored models: work directories, exports, and other people's layouts."""
