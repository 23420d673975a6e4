"""Kernels of hisa, emitted by hsgen."""
