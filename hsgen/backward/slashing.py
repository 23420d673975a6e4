"""Gradients of columns and diagonals that the last rows chose for all, whose lists are made again.

Keys that stay see of diagonals what rows see: how far a step of rows is behind the first key of a tile says
which diagonals cross it, wherever the tile is.  A column has all rows behind it, so columns of a head are
gathered into tiles of their own, whose parts a tile of keys looks up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsgen import cols, slashes
from hsgen.backward.tokens import Lists
from hsgen.graph import Node, Select
from hsgen.plan import Buffer, Config, Launch
from hsgen.rows import RowsContext, Shape, pointer
from hsgen.schedule import choosing, slashing, text
from hsgen.schedule.draft import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The lists of a branch: of columns, diagonals, or both."""

    branch: str
    node: str
    columns: Node | None
    diagonals: Node | None
    widths: tuple[int, int]

    @classmethod
    def of(cls, draft: Draft, node: Node, branch: str) -> Chosen | None:
        """Those of a branch; None of any other."""
        columns, diagonals = slashes.lists_of(draft.graph, node)
        if columns is None and diagonals is None:
            return None
        widths = tuple(draft.width(x) if x else 0 for x in (columns, diagonals))
        return cls(
            branch=branch,
            node=node.name,
            columns=columns,
            diagonals=diagonals,
            widths=(widths[0], widths[1]),
        )

    @property
    def of_columns(self) -> tuple[str, ...]:
        """The list of columns, and how many there are."""
        return _listed(self.columns)

    @property
    def of_diagonals(self) -> tuple[str, ...]:
        return _listed(self.diagonals)


def _listed(node: Node | None) -> tuple[str, ...]:
    if node is None:
        return ()
    assert isinstance(node.op, Select)
    return text.buffer(choosing.chosen_of(node)), slashing.COUNTS.format(node.op.level)


def forward(shape: Shape, chosen: Chosen, *, scale: float) -> RowsContext:
    """The loops over what a tile of rows sees; heads that have nothing of it leave gradients as they are."""
    columns, diagonals = chosen.widths
    name = f"attend_{chosen.branch}"
    return slashes.attend(
        shape, name=name, scale=scale, columns=columns, diagonals=diagonals, later=True
    )


def listed(draft: Draft, chosen: Chosen, leader: str, *, by_keys: bool) -> Lists:
    """Bits of diagonals and columns, and the steps that a tile of rows, or of keys, walks."""
    if chosen.diagonals is None:
        return Lists(buffers=(), sizes=(), launches=(), arguments=chosen.of_columns)
    heads, side = draft.shape.query_heads, "keys" if by_keys else "rows"
    name = f"{chosen.branch}_{side}"
    slants = slashes.SlantsContext(
        name=f"index_{name}",
        heads=heads,
        width=chosen.widths[1],
        columns=chosen.widths[0],
        by_keys=by_keys,
    )
    index = Config(constexprs=(("BLOCK_K", 64),), num_warps=8, num_stages=1)
    draft.kernel("index", slants, index, chosen.node, follows=leader)
    stays, step = (f'config["{leader}"]["{x}"]' for x in slants.tile)
    words, capacity = f"words_{name}", f"steps_{name}"
    tile, wide = f"tile_{name}", f"step_{name}"
    each = ("batch.sequences", str(heads))
    many = {"bits": (words,), "list": ("2", capacity), "before": ("2", f"{capacity} + 1")}
    if chosen.columns is not None:
        many = {"column_bits": (words,)} | many
    made = {x: f"{x}_{name}" for x in many}
    of_bits = [made[x] for x in ("column_bits", "bits") if x in made]
    slanted = (*of_bits, words, made["list"], made["before"], capacity)
    launch = Launch(
        kernel=slants.name,
        grid=tuple(reversed(each)),
        arguments=(*chosen.of_diagonals, *chosen.of_columns, *slanted, *text.SEQ),
    )
    return Lists(
        buffers=tuple(
            Buffer(
                name=made[x],
                dtype="i64" if x.endswith("bits") else "i32",
                dims=(*each, *dims),
                role="list",
            )
            for x, dims in many.items()
        ),
        sizes=(
            (words, "batch.keys // 64 + 1"),
            (tile, stays),
            (wide, step),
            (capacity, f"(batch.keys + {tile}) // {wide} + 2"),
        ),
        launches=(launch,),
        arguments=(*chosen.of_columns, *slanted),
    )


# --- keys stay


def by_column(shape: Shape, branch: cols.Branch, chosen: Chosen) -> cols.ColsContext:
    """Columns of a query head, for all rows behind them."""
    made = cols.of_window(replace(shape, kv_heads=shape.query_heads), branch, window=None)
    return replace(
        made,
        name=f"dkv_columns_{branch.name}",
        summary="what rows give the keys that are columns of a head.",
        group=shape.group,
        heads=1,
        split=True,
        columns=chosen.widths[0],
        reads=slashes.columns_of(shape.query_heads, chosen.widths[0]),
    )


def by_key(shape: Shape, branch: cols.Branch, chosen: Chosen) -> cols.ColsContext:
    """Keys for the rows that diagonals lead to, head by head; what they got as columns comes to it."""
    columns, diagonals = chosen.widths
    made = cols.of_window(shape, branch, window=None)
    lists = slashes.columns_of(shape.query_heads, columns) if columns else ()
    parts = (
        pointer("PART_K", "f32", f"f32[Z, {shape.query_heads}, {columns}, Dqk] of columns"),
        pointer("PART_V", "f32", f"f32[Z, {shape.query_heads}, {columns}, Dv]"),
    )
    common = replace(
        made,
        heads=1,
        turns=shape.group,
        setup=(),
        visible=(),
        beside=columns,
        asked=shape.query_heads,
        reads=(*lists, *(parts if columns else ())),
    )
    if not diagonals:
        return common
    taken = (
        "columns = tl.load(COLUMN_BITS + list_row * words + n // 64, mask=inside, other=0)",
        "free = ((columns >> (n % 64).to(tl.int64)) & 1) == 0",
    )
    return replace(
        common,
        reads=(*common.reads, *slashes.slants_of(shape.query_heads, columns=bool(columns))),
        setup=(
            f"list_row = z.to(tl.int64) * {shape.query_heads} + head * {shape.group} + turn",
            *(taken if columns else ()),
            "bits = BITS + list_row * words",
            "steps_of = STEPS + list_row * (2 * capacity)",
            "nearer = BEFORE + list_row * (2 * capacity + 2)",
            "behind = tl.minimum(tl.maximum(q_offset - n0, 0) // BLOCK_T, capacity)",
            "reached = tl.maximum(q_offset + q_len - n0 + BLOCK_T - 1, 0) // BLOCK_T",
            "reached = tl.where(q_len > 0, tl.minimum(reached, capacity), behind)",
            "whole = tl.load(nearer + behind, mask=q_len > 0, other=0)",
            "wholes = tl.load(nearer + reached, mask=q_len > 0, other=0) - whole",
            "some = tl.load(nearer + capacity + 1 + behind, mask=q_len > 0, other=0)",
            "steps = tl.load(nearer + capacity + 1 + reached, mask=q_len > 0, other=0) - some + wholes",
        ),
        at=(
            "place = tl.where(i < wholes, whole + i, capacity + some + i - wholes)",
            "t0 = n0 + tl.load(steps_of + place) * BLOCK_T - q_offset",
            "until = q_len",
        ),
        of_rows=(
            "word = bits_from(bits, words * 64 - q_offset - t0 - BLOCK_T + n, words)",
            *(("word = tl.where(free, word, 0)",) if columns else ()),
        ),
        visible=("marked(word, BLOCK_T - 1 - row_token)",),
        most_tokens=slashes.STEP,
    )


def parts(
    draft: Draft, chosen: Chosen, context: cols.ColsContext, read: tuple[str, ...]
) -> tuple[tuple[Buffer, ...], Launch]:
    """What columns are given, and the launch that gives it."""
    heads, width = str(draft.shape.query_heads), str(chosen.widths[0])
    made = tuple(f"part_{x}_{chosen.branch}" for x in "kv")
    buffers = tuple(
        Buffer(
            name=part,
            dtype="f32",
            dims=("batch.sequences", heads, width, str(dim)),
            role="scratch",
        )
        for part, dim in zip(made, (draft.shape.qk, draft.shape.v), strict=True)
    )
    launch = Launch(
        kernel=context.name,
        grid=(f"{width} // {{BLOCK_N}} + 1", heads, "batch.sequences"),
        arguments=(*read, *made, *text.SEQ),
    )
    return buffers, launch
