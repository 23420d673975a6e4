"""Kernels of psa_mass, emitted by hsgen."""
