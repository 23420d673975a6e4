"""Kernels of hirouter, emitted by hsgen."""
