"""Kernels of s2_attention, emitted by hsgen."""
