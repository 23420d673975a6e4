"""Kernels of sparse_mla, emitted by hsgen."""
