"""What must hold for every spec: exact probes, errors, selections and laws, over any backend.

systems    the shipped specs, shrunk and bound
calls      tensors and options of one call; its outcome
backends   who computes: emitted kernels on CPU or GPU, or the reference standing in for them
oracles    is an outcome right: errors against float64, selections level by level
probes     exact: inputs made so that a wrong mask, index or normaliser shows in the bits
laws       what several calls must have to do with one another
covering   few cases that meet every pair of settings
"""
