"""Kernels of svg2, emitted by hsgen."""
