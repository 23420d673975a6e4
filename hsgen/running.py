"""The tokens of greatest bias up to each row, whatever it asks: what fills `_rank_running.jinja`.

A token that others have passed never comes back, so what a row keeps is what the row before keeps and its
own token, less one.  The best tokens before every so many are found first, one such point after the other;
rows then begin at the point before them, tile by tile, whatever other tiles do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.kernels import MEANS, tunables
from hsgen.plan import Param
from hsgen.rows import BIAS, SEQ, Entries, count, jit, next_power, pointer

TILE_ROWS = 64  # of a tile


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningContext:
    """Everything `_rank_running.jinja` reads.

    `points`: the best tokens before each point.  `running`: those of each row.  The `first` tokens, and the
    `last` of each row, are forced: they are not ranked.
    """

    name: str
    how: Literal["points", "running"]
    header: str = ""
    pieces: str = ""
    heads: int
    k: int
    width: int  # slots of a row: k, and the forced ones where they are not counted
    first: int
    last: int
    counted: bool
    causal: bool

    @property
    def summary(self) -> str:
        if self.how == "points":
            return f"the {self.ranked} tokens of greatest bias before each point of a sequence."
        return f"the {self.ranked} tokens of greatest bias up to each row."

    @property
    def ranked(self) -> int:
        """How many tokens that are not forced a row keeps."""
        return self.k - self.first if self.counted else self.k

    @property
    def padded_width(self) -> int:
        """`width` as a tile."""
        return next_power(self.width)

    @property
    def most_rows(self) -> int:
        """Of a tile, at most."""
        return TILE_ROWS

    @property
    def room(self) -> int:
        """Slots of a point's list, and tokens behind it that a tile of rows has at hand."""
        return next_power(max(16, self.ranked, 2 * (TILE_ROWS + self.last)))

    @property
    def span(self) -> int:
        """Tokens from one point to the next: a tile that begins before the next one ends within its room."""
        return self.room - TILE_ROWS - self.last

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"[points of all, {self.heads}, {self.room}] tokens, ascending"
        selection = pointer("SELECTION", "i32", f"[rows, {self.heads}, {self.width}]")
        return (
            *BIAS,
            pointer("LISTS", "i32", shape),
            *((selection,) if self.how == "running" else ()),
            count("points", "of a sequence, the first before all tokens; packed: 1"),
            *SEQ,
            *(tunables("BLOCK_T") if self.how == "running" else ()),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeansContext:
    """Everything `_rank_means.jinja` reads."""

    name: str
    how: Literal["means"] = "means"
    header: str = ""
    pieces: str = ""
    heads: int
    entries: Entries

    @property
    def summary(self) -> str:
        return "the mean bias of every entry, which no query asks for."

    @property
    def params(self) -> tuple[Param, ...]:
        return (*BIAS, *MEANS, *SEQ, *tunables("BLOCK_E"))

    @property
    def jit(self) -> str:
        return jit(self.params)
