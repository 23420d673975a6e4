"""Kernels of nosa, emitted by hsgen."""
