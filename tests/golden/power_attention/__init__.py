"""Kernels of power_attention, emitted by hsgen."""
