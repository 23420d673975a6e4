"""Kernels of seer_attention_r_losses, emitted by hsgen."""
