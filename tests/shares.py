"""A part of a long list of values for every run; all of it with `pytest -m "not gpu"`.

For what a test asks of every shipped spec alike, and other tests of the same stage ask of each.
"""

import pytest


def third(values, *, turn=0):
    """Every third value as it is, the others marked `full`; `turn` says which third."""
    return [
        value if (number + turn) % 3 == 0 else pytest.param(value, marks=pytest.mark.full)
        for number, value in enumerate(values)
    ]
