"""Kernels of seer_attention, emitted by hsgen."""
