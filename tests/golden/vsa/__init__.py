"""Kernels of vsa, emitted by hsgen."""
