"""Kernels of biformer, emitted by hsgen."""
