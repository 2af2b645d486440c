"""Kernels of range attention, in Pallas: for TPUs and for GPUs."""
