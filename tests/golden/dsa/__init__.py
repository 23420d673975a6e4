"""Kernels of dsa, emitted by hsgen."""
