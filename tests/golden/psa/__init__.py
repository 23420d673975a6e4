"""Kernels of psa, emitted by hsgen."""
