"""Kernels of nsa_fla, emitted by hsgen."""
