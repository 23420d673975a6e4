"""Kernels of draft_attention, emitted by hsgen."""
