"""Measurements of hsgen: quality on real input, speed on a GPU.  Run as `python -m benchmarks.NAME`."""
