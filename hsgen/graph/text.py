"""Operators as text, and columns of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import cast

from hsgen.graph.ops import Op

Taps = tuple[tuple[int, int], ...]  # offset and weight
MANY = 8


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column), default=0) for column in zip(*rows, strict=True)]
    return [
        " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def op_text(op: Op) -> str:
    """An operator as `name(field=value, ...)`, fields that are None left out."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(op).__name__).lower()
    return f"{name}({', '.join(f'{field}={text}' for field, text in op_fields(op).items())})"


def op_fields(op: Op) -> dict[str, str]:
    """An operator's fields as text, those that are None left out."""
    shown = ((each.name, getattr(op, each.name)) for each in fields(op))
    return {name: _value_text(value) for name, value in shown if value is not None}


def _value_text(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    items = cast("tuple[object, ...]", value)
    pairs = items and all(isinstance(item, tuple) for item in items)
    shown = _taps_text(cast("Taps", items)) if pairs else map(str, items)
    return f"[{' '.join(shown)}]"


def _taps_text(taps: Taps) -> list[str]:
    """`+0:1 +1:2`; more than MANY offsets in a row that weigh the same are `+0..+15:1`."""
    found: list[tuple[int, int, int]] = []
    for offset, weight in taps:
        first, last, same = found[-1] if found else (0, 0, 0)
        if found and offset == last + 1 and weight == same:
            found[-1] = (first, offset, weight)
        else:
            found.append((offset, offset, weight))
    shown: list[str] = []
    for first, last, weight in found:
        run = range(first, last + 1)
        shown += (
            [f"{first:+d}..{last:+d}:{weight}"]
            if len(run) > MANY
            else [f"{offset:+d}:{weight}" for offset in run]
        )
    return shown
