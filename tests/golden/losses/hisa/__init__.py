"""Kernels of hisa_kl_losses, emitted by hsgen."""
