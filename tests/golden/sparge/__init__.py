"""Kernels of sparge, emitted by hsgen."""
