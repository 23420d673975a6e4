"""Gradients of tokens that heads keep, where a call chose for itself: its lists are made again.

Rows are in the order of the forward, kept ones first, so that no tile of them has gaps.  Keys stay where
they lie: each looks up whether a head keeps it, head after head of its group, and kept rows stream past.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsgen import cols, keeping, rows
from hsgen.backward import tiles
from hsgen.graph import Node, SelectSet
from hsgen.plan import Buffer, Config, Launch
from hsgen.rows import RowsContext, Shape
from hsgen.schedule import choosing, staying, text
from hsgen.schedule.draft import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What heads keep.  lists: the buffers of tokens and of how many, and the slots of a list."""

    branch: str
    node: str
    lists: tuple[str, str, str]

    @classmethod
    def of(cls, draft: Draft, node: Node, branch: str) -> Kept:
        selection = draft.graph[node.inputs[3]]
        assert isinstance(selection.op, SelectSet), "a choice of each head"
        made = text.buffer(choosing.chosen_of(selection))
        lists = (made, staying.counts(selection.op.level), draft.slots(selection))
        return cls(branch=branch, node=node.name, lists=lists)

    @property
    def order(self) -> tuple[str, ...]:
        """The order of rows, as kernels look it up."""
        order = f"rows_{self.branch}"
        return (order, f"0 if batch.packed else {order}.stride(0)", f"{order}.stride(1)")

    def read(self, *, counts: bool) -> tuple[str, ...]:
        """The lists and the order."""
        made, many, slots = self.lists
        return (made, *((many,) if counts else ()), f"stay_{self.branch}", slots, *self.order)


def sift(draft: Draft, kept: Kept) -> tuple[tuple[Buffer, ...], Launch]:
    """The order of each head's rows, those that it keeps first."""
    heads = str(draft.shape.query_heads)
    context = keeping.SiftContext(name=f"sift_{kept.branch}", heads=draft.shape.query_heads)
    few = Config(constexprs=(("BLOCK_T", 256),), num_warps=4, num_stages=1)
    draft.kernel("index", context, few, kept.node)
    stay, order = f"stay_{kept.branch}", kept.order[0]
    made, many, slots = kept.lists
    dims = ("in_q.shape[0]", heads, "in_q.shape[1]")
    buffers = (
        Buffer(name=stay, dtype="i32", dims=("batch.sequences", heads, "2"), role="list"),
        Buffer(name=order, dtype="i32", dims=dims, role="list"),
    )
    arguments = (made, many, stay, slots, *kept.order, *text.SEQ)
    return buffers, Launch(kernel=context.name, grid=(text.tiles(), heads), arguments=arguments)


def by_row(
    draft: Draft, kept: Kept, forward: RowsContext, *, scale: float, adds: bool
) -> RowsContext:
    """dq of kept rows, in the loops of the forward; that of others is 0."""
    name = f"dq_stay_{kept.branch}"
    dq = cols.query_gradient(forward, name=name, scale=scale, adds=adds)
    config = tiles.of_rows(dq, draft.target, draft.dtype)
    draft.attend(dq, config, kept.node)
    return dq


def by_key(shape: Shape, branch: cols.Branch) -> cols.ColsContext:
    """Keys for the rows of each head that keeps both."""
    made = cols.of_window(shape, branch, window=None)
    heads = shape.query_heads
    counted = keeping.COUNTS
    lists = rows.pointer("LISTS", "i32", "[Z, Hq, width] kept tokens, ascending")
    first = "tl.maximum(place_in(tokens, many, n0) - before, 0)" if shape.causal else "0"
    return replace(
        made,
        name=f"dkv_stay_{branch.name}",
        summary="the gradients of keys and values from the rows of heads that keep both.",
        heads=1,
        turns=shape.group,
        sifted=True,
        reads=(lists, counted, keeping.STAY, keeping.WIDTH, *keeping.ROWS),
        setup=(
            f"asked = z * {heads} + head * {shape.group} + turn",
            "tokens = LISTS + asked.to(tl.int64) * width",
            "many = tl.load(COUNTS + asked * 2)",
            "before = tl.load(STAY + asked * 2, mask=q_len > 0, other=0)",
            "kept = tl.load(STAY + asked * 2 + 1, mask=q_len > 0, other=0)",
            "place = place_in(tokens, many, n)",
            "taken = tl.load(tokens + place, mask=inside & (place < many), other=-1) == n",
            f"start = {first}",
            "steps = (tl.maximum(kept - start, 0) + BLOCK_T - 1) // BLOCK_T",
            f"asked_head = (head * {shape.group} + turn).to(tl.int64)",
            "own_rows = ROWS + z.to(tl.int64) * rows_b + asked_head * rows_h + q_first",
        ),
        at=("t0 = start + i * BLOCK_T", "until = kept"),
        visible=("taken[:, None]", *made.visible),
    )
