"""Kernels of ssa_sparse, emitted by hsgen."""
