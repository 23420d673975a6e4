"""Kernels of delta, emitted by hsgen."""
