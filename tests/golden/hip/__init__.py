"""Kernels of hip, emitted by hsgen."""
