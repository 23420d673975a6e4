"""Kernels of superlinear, emitted by hsgen."""
