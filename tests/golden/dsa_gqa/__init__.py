"""Kernels of dsa_gqa, emitted by hsgen."""
