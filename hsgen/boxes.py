"""Windows along axes: tiles of rows are boxes of tokens, and walk the box of keys that any of them sees.

No token is copied: a step's keys are counted along the axes of their box, and so are a tile's rows.  Where
rows of a box have one window, which rows of a stride have, no key is masked but those behind the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsgen.graph import AxisWindow, Pattern
from hsgen.rows import (
    LOG2_E,
    OUTPUTS,
    QUERY,
    SEQ,
    Box,
    Phase,
    RowsContext,
    Shape,
    blocks,
    heads_of,
    keys_and_values,
    next_power,
    number,
)

MOST_AXES = 3
TOKENS = 128  # of a box, about
NAMES = ("x", "y", "w")


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Up to three axes, the last one fastest, the first of which may be as long as the tokens need.

    size: tokens of a box along each axis.
    """

    axes: tuple[AxisWindow, AxisWindow, AxisWindow]
    size: tuple[int, int, int]

    @classmethod
    def of(cls, pattern: Pattern) -> Boxes:
        """Three axes, of which middle ones may have one step."""
        alone = AxisWindow(length=1, window=1, stride=1, dilation=1, causal=False)
        first, *rest = pattern.axes
        _, second, third = (first, *[alone] * (MOST_AXES - len(pattern.axes)), *rest)
        axes = (first, second, third)
        return cls(axes=axes, size=_size(axes))

    @property
    def box(self) -> Box:
        return Box(size=self.size, lengths=self.lengths)

    @property
    def lengths(self) -> tuple[int, int]:
        """Of the axes but the first."""
        _, second, third = self.axes
        assert second.length is not None, "bound"
        assert third.length is not None, "bound"
        return second.length, third.length

    @property
    def inner(self) -> int:
        """Tokens of a step of the first axis."""
        return math.prod(self.lengths)

    def length(self, a: int) -> str:
        """How many steps an axis has."""
        return str(self.axes[a].length or "long")

    @property
    def begin(self) -> tuple[str, ...]:
        """Statements: how long the first axis is, where the keys say it."""
        if self.axes[0].length is not None:
            return ()
        return (f"long = tl.maximum((k_len + {self.inner - 1}) // {self.inner}, 1)",)

    def window(self, a: int) -> str:
        """What pieces are told of a window along an axis, behind its length."""
        axis = self.axes[a]
        return f"{axis.window}, {axis.stride}, {axis.causal}"

    def alike(self, a: int) -> bool:
        """Whether rows of a box have one window along an axis."""
        axis = self.axes[a]
        return not axis.causal and axis.stride % self.size[a] == 0


def _size(axes: tuple[AxisWindow, AxisWindow, AxisWindow]) -> tuple[int, int, int]:
    """Steps of a box: doubled where rows keep one window, no box is cut off, and the box stays a cube."""
    size = [1] * len(axes)
    while math.prod(size) < TOKENS:
        room = [a for a, axis in enumerate(axes) if axis.length is None or size[a] < axis.length]
        if not room:
            break

        def cost(a: int) -> tuple[bool, bool, int, int]:
            axis, wide = axes[a], 2 * size[a]
            return (
                axis.stride % wide != 0 and axis.stride > 1,
                bool(axis.length and axis.length % wide),
                size[a],
                -a,
            )

        size[min(room, key=cost)] *= 2
    return size[0], size[1], size[2]


def lacking(pattern: Pattern, *, causal: bool) -> str | None:
    """What of windows along axes no kernel does yet."""
    lacks = (
        (not pattern.without_units, "attends windows along axes beside units"),
        (causal, "attends windows along axes of a causal order"),
        (len(pattern.axes) > MOST_AXES, f"attends windows along more than {MOST_AXES} axes"),
        (any(axis.dilation > 1 for axis in pattern.axes), "attends windows along axes with gaps"),
        (
            any(axis.length is None for axis in pattern.axes[1:]),
            "attends windows along axes but the first whose lengths are not bound",
        ),
    )
    return next((words for missing, words in lacks if missing), None)


def attend(shape: Shape, *, name: str, scale: float, boxes: Boxes) -> RowsContext:
    """One softmax over the windows along all axes."""
    heads = heads_of(shape, per_head=False)
    masked = [a for a in range(MOST_AXES) if not boxes.alike(a)]
    setup = [*boxes.begin]
    for a, x in enumerate(NAMES):
        n, window, wide = boxes.length(a), boxes.window(a), boxes.size[a]
        setup += [
            f"begin_{x} = window_begin(first_{x}, {n}, {window})",
            f"end_{x} = window_end(first_{x} + {wide - 1}, {n}, {window})",
            f"wide_{x} = tl.maximum(end_{x} - begin_{x}, 0)",
        ]
        if a in masked:
            setup += [
                f"low_{x} = window_begin({x}, {n}, {window})",
                f"high_{x} = window_end({x}, {n}, {window})",
            ]
    box = boxes.box
    last = box.place("(end_x - 1)", "end_y - 1", "end_w - 1")
    setup += [
        "seen_keys = wide_x * wide_y * wide_w",
        f"last_key = {last}",
        "full = tl.where(last_key < k_len, seen_keys // BLOCK_N * BLOCK_N, 0)",
    ]
    body = (
        "key_w = begin_w + e % wide_w",
        "key_y = begin_y + e // wide_w % wide_y",
        "key_x = begin_x + e // (wide_w * wide_y)",
        f"n = {box.place('key_x', 'key_y', 'key_w')}",
    )
    seen = tuple(
        condition
        for a in masked
        for condition in (
            f"key_{NAMES[a]}[None, :] >= low_{NAMES[a]}[:, None]",
            f"key_{NAMES[a]}[None, :] < high_{NAMES[a]}[:, None]",
        )
    )
    return RowsContext(
        name=name,
        summary="attention over windows along axes.",
        params=(*QUERY, *keys_and_values(shape), *OUTPUTS, *SEQ, *blocks(heads)),
        acc="softmax",
        **heads,
        key_row="k_first",
        setup=tuple(setup),
        phases=(
            Phase(
                kind="boxes",
                comment="keys of the box that rows see",
                start="0",
                stop="full",
                body=body,
                visible=seen,
            ),
            Phase(
                kind="boxes",
                comment="the last of them, and those that may be none",
                start="full",
                stop="seen_keys",
                body=body,
                inside="(e < seen_keys) & (n < k_len)",
                visible=("inside[None, :]", *seen),
            ),
        ),
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
        box=box,
        most_tokens=next_power(box.tokens),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Takers:
    """What walks the rows whose windows have one of a box's keys: statements before the loop and in it."""

    setup: tuple[str, ...]
    at: tuple[str, ...]
    visible: tuple[str, ...]


def takers(boxes: Boxes) -> Takers:
    """Rows of the box that is between the first and the last that see some key, along each axis."""
    setup, at, seen = [*boxes.begin], [], list[str]()
    setup.append(f"rows_x = (q_offset + q_len + {boxes.inner - 1}) // {boxes.inner}")
    for a, x in enumerate(NAMES):
        n, window, wide = boxes.length(a), boxes.window(a), boxes.size[a]
        most = "rows_x" if a == 0 else n
        setup += [
            f"begin_{x} = first_taker(first_{x}, {n}, {window})",
            f"end_{x} = last_taker(tl.minimum(first_{x} + {wide - 1}, {n} - 1), {n}, {window}) + 1",
            f"wide_{x} = tl.maximum(tl.minimum(end_{x}, {most}) - begin_{x}, 0)",
        ]
        if a == 0 and not boxes.axes[a].causal:  # rows before the first place see its window
            before = f"tl.minimum(block_at(q_offset, {boxes.inner}), 0)"
            setup.insert(-2, f"begin_{x} = tl.where(begin_{x} > 0, begin_{x}, {before})")
    setup += ["taking = wide_x * wide_y * wide_w", "steps = (taking + BLOCK_T - 1) // BLOCK_T"]
    at += [
        "e = i * BLOCK_T + row_token",
        "row_w = begin_w + e % tl.maximum(wide_w, 1)",
        "row_y = begin_y + e // tl.maximum(wide_w, 1) % tl.maximum(wide_y, 1)",
        "row_x = begin_x + e // tl.maximum(wide_w * wide_y, 1)",
        f"token = {boxes.box.place('row_x', 'row_y', 'row_w')} - q_offset",
        "alive = (e < taking) & (token >= 0) & (token < q_len)",
    ]
    for a, x in enumerate(NAMES):
        n, window = boxes.length(a), boxes.window(a)
        at += [f"low_{x} = window_begin(row_{x}, {n}, {window})"]
        at += [f"high_{x} = window_end(row_{x}, {n}, {window})"]
        seen += [
            f"{x}[:, None] >= low_{x}[None, :]",
            f"{x}[:, None] < high_{x}[None, :]",
        ]
    return Takers(setup=tuple(setup), at=tuple(at), visible=tuple(seen))
