"""Kernels of flex_prefill, emitted by hsgen."""
