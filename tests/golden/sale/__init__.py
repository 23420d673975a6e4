"""Kernels of sale, emitted by hsgen."""
