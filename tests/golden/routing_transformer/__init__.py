"""Kernels of routing_transformer, emitted by hsgen."""
