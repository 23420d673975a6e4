"""The dimension of rows: T, each for itself; T/128, blocks of 128; T/4x4, tiles; 1, the last ones for all.

Any other number: clusters of rows.
"""

from __future__ import annotations

import math


def rows_dim(
    block: int | None,
    last: int | None,
    tile: tuple[int, ...] | None = None,
    clusters: int | None = None,
) -> str:
    """Of rows that choose together, by block, by tile, by cluster or by the last ones."""
    if clusters is not None:
        return str(clusters)
    if tile is not None:
        return f"T/{'x'.join(map(str, tile))}"
    return f"T/{block}" if block is not None else "T" if last is None else "1"


def block_of(dim: str) -> int | None:
    """Rows of one block or tile; None where each row is for itself, or one is for all."""
    if not dim.startswith("T/"):
        return None
    return math.prod(int(steps) for steps in dim.removeprefix("T/").split("x"))


def is_rows(dim: str) -> bool:
    return dim == "T" or dim.isdecimal() or block_of(dim) is not None


def own_entries(dim: str, stride: int) -> int:
    """How many entries the own ones of rows that choose together are, at most."""
    block = block_of(dim) or 1
    if not stride:
        return 1
    nested = block % stride == 0 or stride % block == 0
    return 1 + (block - 1) // stride + (not nested)
