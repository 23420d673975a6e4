"""Kernels of s2o, emitted by hsgen."""
