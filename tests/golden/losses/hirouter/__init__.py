"""Kernels of hirouter_losses, emitted by hsgen."""
