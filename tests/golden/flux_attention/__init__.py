"""Kernels of flux_attention, emitted by hsgen."""
