"""Kernels of draft_attention_head, emitted by hsgen."""
