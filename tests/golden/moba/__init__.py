"""Kernels of moba, emitted by hsgen."""
