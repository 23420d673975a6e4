"""Kernels of pbs_attn, emitted by hsgen."""
