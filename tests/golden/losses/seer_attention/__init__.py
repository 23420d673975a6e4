"""Kernels of seer_attention_losses, emitted by hsgen."""
