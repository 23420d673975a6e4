"""Kernels of deepseek_hca, emitted by hsgen."""
