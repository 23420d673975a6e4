"""Kernels of dsa_gqa_kl_losses, emitted by hsgen."""
