"""Kernels of qwen_qsa, emitted by hsgen."""
