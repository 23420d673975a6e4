"""The dimension of rows: T, each for itself; T/128, blocks of 128; 1, the last ones for all."""

from __future__ import annotations


def rows_dim(block: int | None, last: int | None) -> str:
    """Of rows that choose together, by block or by the last ones."""
    return f"T/{block}" if block is not None else "T" if last is None else "1"


def block_of(dim: str) -> int | None:
    """Rows of one block; None where each row is for itself, or one is for all."""
    return int(dim.removeprefix("T/")) if dim.startswith("T/") else None


def is_rows(dim: str) -> bool:
    return dim in ("T", "1") or block_of(dim) is not None


def own_entries(dim: str, stride: int) -> int:
    """How many entries the own ones of rows that choose together are, at most."""
    block = block_of(dim) or 1
    if not stride:
        return 1
    nested = block % stride == 0 or stride % block == 0
    return 1 + (block - 1) // stride + (not nested)
