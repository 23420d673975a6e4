"""Kernels of xattention, emitted by hsgen."""
