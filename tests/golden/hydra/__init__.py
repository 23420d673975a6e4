"""Kernels of hydra, emitted by hsgen."""
