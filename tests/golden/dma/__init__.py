"""Kernels of dma, emitted by hsgen."""
