"""Kernels of svg_ear, emitted by hsgen."""
