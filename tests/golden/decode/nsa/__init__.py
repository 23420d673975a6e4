"""Kernels of nsa, emitted by hsgen."""
