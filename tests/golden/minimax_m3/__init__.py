"""Kernels of minimax_m3, emitted by hsgen."""
