"""Kernels of small_thinker, emitted by hsgen."""
