"""Kernels of infllm_v2, emitted by hsgen."""
