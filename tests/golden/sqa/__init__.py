"""Kernels of sqa, emitted by hsgen."""
