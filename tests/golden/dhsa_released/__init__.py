"""Kernels of dhsa_released, emitted by hsgen."""
