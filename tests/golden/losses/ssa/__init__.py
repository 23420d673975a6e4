"""Kernels of ssa_losses, emitted by hsgen."""
