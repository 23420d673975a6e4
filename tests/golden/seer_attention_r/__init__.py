"""Kernels of seer_attention_r, emitted by hsgen."""
