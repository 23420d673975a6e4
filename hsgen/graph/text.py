"""Operators as text, and columns of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import cast

from hsgen.graph.ops import Op


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
    if isinstance(value, tuple):
        return f"[{' '.join(map(_item_text, cast('tuple[object, ...]', value)))}]"
    return str(value)


def _item_text(item: object) -> str:
    if isinstance(item, tuple):  # taps
        offset, weight = cast("tuple[int, int]", item)
        return f"{offset:+d}:{weight}"
    return str(item)
