"""Gradients of blocks that rows chose together, where a backward makes that choice again.

A block of rows has a bit for each block of keys.  Tiles of rows have lists of these, in turns, as in the
forward; what keys need of them, the blocks of rows that chose each, has all of its rows.  A caller's lists
are of single rows, and have kernels of their own where there may be any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hsgen import configs, estimates, foretold, together
from hsgen.estimates import Shown
from hsgen.foretold import EitherContext, Foretold
from hsgen.graph import Attend, Node
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import RowsContext
from hsgen.schedule import choosing, estimating, foretelling, selected, text
from hsgen.schedule.draft import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What blocks of rows of a branch chose.

    bits: the buffer, and words of one of its rows.  shown: what a pattern beside it shows each row.
    lists: that a caller may bring others.
    """

    bits: tuple[str, str]
    shown: Shown | None = None
    lists: bool = False


def chosen_again(draft: Draft, node: Node, op: Attend) -> Chosen | None:
    """That of a branch whose choice is made again; None of any other."""
    if found := foretold.foretold(draft.graph):
        return _of_either(draft, found, op)
    if shown := estimates.shown_beside(draft.graph, node):
        selection = draft.graph[node.inputs[3]]
        bits = text.buffer(choosing.chosen_of(selection))
        return Chosen(bits=(bits, estimating.words_of(selection)), shown=shown, lists=True)
    return None


def _of_either(draft: Draft, found: Foretold, op: Attend) -> Chosen:
    """As heads chose in one of two ways: a step makes one of both."""
    name, heads = op.branch, str(draft.shape.query_heads)
    bits, words, blocks = f"bits_{name}", f"words_{name}", f"row_blocks_{name}"
    rows_ = found.size
    context = EitherContext(
        name=f"either_{name}",
        heads=draft.shape.query_heads,
        rows=rows_,
        way=found.way,
        bits=True,
    )
    draft.kernel("index", context, configs.listing(), found.attend.name)
    width = draft.slots(found.blocks)
    draft.steps.append(
        Step(
            title=f"bits of blocks: {name}",
            needs=foretelling.chosen_of(found),
            makes=(f"{found.attend.name}.bits",),
            sizes=(
                (blocks, together.blocks_of(rows_)),
                (words, f"(entries_{found.level} + 31) // 32"),
            ),
            buffers=(Buffer(name=bits, dtype="i32", dims=(blocks, heads, words), role="list"),),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(f"{blocks} + batch.sequences", heads),
                    arguments=(*foretelling.lists_of(found), bits, words, width, *text.SEQ),
                ),
            ),
        )
    )
    return Chosen(bits=(bits, words))


def queries(
    draft: Draft,
    node: Node,
    op: Attend,
    chosen: Chosen,
    *,
    makes: Callable[[RowsContext], RowsContext],
    tiles: Callable[[RowsContext], Config],
    read: tuple[str, ...],
    buffers: tuple[Buffer, ...],
) -> None:
    """dq over the lists of tiles.

    makes: its loops, of the forward's.  read: what it reads of rows and writes.
    """
    branch = replace(
        selected.branch_of(draft, node, op),
        walk=f"dq_{op.branch}",
        outputs=read,
        buffers=buffers,
        sink=False,
        lists=chosen.bits[0],
        bits=chosen.bits[1],
        shown=chosen.shown,
    )
    (index, members, walk), (own, others) = together.plan(draft.shape, branch, tiles, makes=makes)
    own, others = (replace(x, title=f"queries: {op.branch}") for x in (own, others))
    if chosen.lists:
        draft.add((index, members, walk), (own, others))
    else:
        draft.add((index, walk), (replace(own, of=None),))
