"""Kernels of glm_kpool, emitted by hsgen."""
