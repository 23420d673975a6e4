"""Kernels of token_sparse, emitted by hsgen."""
