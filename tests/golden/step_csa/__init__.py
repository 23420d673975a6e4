"""Kernels of step_csa, emitted by hsgen."""
