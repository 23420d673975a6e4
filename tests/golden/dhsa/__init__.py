"""Kernels of dhsa, emitted by hsgen."""
