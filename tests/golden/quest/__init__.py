"""Kernels of quest, emitted by hsgen."""
