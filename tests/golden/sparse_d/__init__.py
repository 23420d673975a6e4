"""Kernels of sparse_d, emitted by hsgen."""
