"""Kernels of nsa_xunhao, emitted by hsgen."""
