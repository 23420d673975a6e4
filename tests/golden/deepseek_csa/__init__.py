"""Kernels of deepseek_csa, emitted by hsgen."""
