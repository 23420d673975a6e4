"""Kernels of minference, emitted by hsgen."""
