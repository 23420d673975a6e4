"""Kernels of proxy_attn, emitted by hsgen."""
