"""Kernels of moa, emitted by hsgen."""
