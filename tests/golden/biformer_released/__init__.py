"""Kernels of biformer_released, emitted by hsgen."""
