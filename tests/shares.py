"""A part of a long list of values for every run; all of it with `pytest -m "not gpu"`.

For what a test asks of every shipped spec alike, and other tests of the same stage ask of each.
"""

import itertools

import pytest


def third(values, *, turn=0):
    """Every third value as it is, the others marked `full`; `turn` says which third."""
    return [
        value if (number + turn) % 3 == 0 else pytest.param(value, marks=pytest.mark.full)
        for number, value in enumerate(values)
    ]


def covering(*lists, every=2):
    """A product of lists, of which every run has one in so many: all values, and where a third list is as
    long all pairs, the others marked `full`.  Values that are tuples are several arguments.
    """
    found = []
    for places in itertools.product(*(range(len(values)) for values in lists)):
        flat = []
        for values, place in zip(lists, places, strict=True):
            value = values[place]
            flat += value if isinstance(value, tuple) else (value,)
        marks = () if sum(places) % every == 0 else pytest.mark.full
        found.append(pytest.param(*flat, marks=marks))
    return found
