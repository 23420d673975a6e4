"""Kernels of kinetics, emitted by hsgen."""
