"""Kernels of gna, emitted by hsgen."""
