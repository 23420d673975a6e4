"""Kernels of hylra, emitted by hsgen."""
