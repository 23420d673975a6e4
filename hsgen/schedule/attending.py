"""Launches of branches: over windows, everything and pooled entries; and a log-sum-exp alone."""

from __future__ import annotations

from collections.abc import Callable

from hsgen import keeping, patterns, rows, walks
from hsgen.errors import PlanError
from hsgen.graph import (
    Attend,
    Node,
    Score,
    left_to_window,
)
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import selected, spanning, staying, stepping, text, walking
from hsgen.schedule.draft import Draft

MOST_DIMS = 256  # of queries and keys that are no latents


def attend(draft: Draft, node: Node, op: Attend) -> None:
    if by := _own_way(draft, node, op):
        by(draft, node, op)
        return
    name = f"attend_{op.branch}"
    shape = draft.shape_of(op)
    scale = op.scale if op.scale is not None else 1.0
    launches: list[Launch] = []
    buffers: list[Buffer] = []
    sizes: list[tuple[str, str]] = []
    found: selected.ByTiles | None = None
    most, block = 128, None
    match op.over:
        case "window":
            context = rows.attend_window(shape, name=name, scale=scale, window=op.window or 1)
        case "all":
            context = rows.attend_all(shape, name=name, scale=scale)
        case "pooled":
            entries = draft.pooled_entries(node.inputs[1])
            context = rows.attend_pooled(
                shape, name=name, scale=scale, entries=entries, values=True
            )
        case "static":
            context = patterns.attend(shape, op, name=name)
            most, block = context.most_tokens or most, context.units or None
        case "tokens" | "tiers" | "spans":
            raise AssertionError("refused, or planned in its own way")
        case "blocks":
            found = selected.attend_blocks(draft, node, op)
            context = found.context
    lists: selected.Lists | None = None
    if found:
        config = found.config
        lists = selected.index_blocks(draft, node, op, found)
        launches.append(lists.launch)
        buffers += lists.buffers
        sizes += lists.sizes
    else:
        context = selected.as_branch(draft, context, node, op)
        if op.over != "pooled":
            context = rows.with_pages(context, draft.page)
        config = draft.tiles(context, limit=128, most=most, block=block)
    draft.attend(context, config, *draft.makes(node))
    turns = bool(lists and lists.turn)
    tiles = "count" if turns else text.tiles(context)
    if context.box:
        tiles, pieces = text.tiles_of_boxes(context, name)
        sizes += pieces
    if context.parts:
        tiles = f"row_tiles_{op.branch}"
        sizes += [(tiles, text.tiles_of(name)), *text.parts(context)]
    launches.append(
        draft.launch(
            Launch(
                kernel=name,
                grid=text.grid(shape, context, tiles),
                arguments=(
                    *draft.tensors(node, op),
                    *(lists.arguments if lists else ()),
                    *draft.outputs(node),
                    *draft.seq(context),
                    *(("tile_first",) if turns else ()),
                ),
            )
        )
    )
    buffers += draft.output_buffers(node)
    draft.steps.append(
        Step(
            title=f"attend: {op.branch}",
            needs=draft.needs(node, *node.inputs),
            makes=draft.makes(node),
            buffers=tuple(buffers),
            launches=tuple(launches),
            sizes=tuple(sizes),
            tiles=lists.tiles if lists else None,
            chunk=lists.turn if lists else None,
        )
    )


def _own_way(draft: Draft, node: Node, op: Attend) -> Callable[[Draft, Node, Attend], None] | None:
    """What plans a branch of several kernels; None: one walks its keys, perhaps behind an index."""
    if draft.steps_alone:
        return stepping.attend
    if left_to_window(draft.graph, node):
        return selected.attend_picked
    if op.over == "blocks" and walks.walked(draft.graph, draft.graph[node.inputs[3]]):
        return walking.attend
    if keeping.attended(draft.graph, node):
        return staying.attend
    match op.over:
        case "pooled" if draft.chosen(node):
            return selected.attend_gathered
        case "spans":
            return spanning.attend
        case "tokens" | "blocks" if draft.block(draft.graph[node.inputs[3]]):
            return selected.attend_together
        case "tokens" if op.biased:
            return selected.attend_picked
        case "tokens":
            return selected.attend_tokens
        case "tiers":
            return selected.attend_tiers
        case "blocks" if selected.order_of(draft, node, op) == "keys":
            return selected.attend_by_blocks
        case "blocks" if selected.picks(draft, node, op):
            return selected.attend_picked
        case _:
            return None


def log_sum_exp(draft: Draft, node: Node) -> None:
    """The softmax sum of a level's scores, where no branch computes it anyway."""
    score = draft.graph[node.inputs[0]]
    assert isinstance(score.op, Score)
    pooled = draft.pool_of(score.inputs[1]) is not None
    raw = score.inputs[0] == "q" and draft.shape.qk <= MOST_DIMS and score.op.size == 1
    if score.op.form != "dot" or score.op.within is not None or not (pooled or raw):
        message = f"level {score.op.level}: no kernel normalises these scores yet"
        raise PlanError(message, span=node.span)
    if draft.steps_alone:
        stepping.log_sum_exp(draft, node, score)
        return
    context = stepping.log_sum_exp_of(draft, score)
    config = draft.row_tiles.attend(context, limit=64)
    draft.kernel("rows", context, config, score.name, node.name)
    draft.steps.append(
        Step(
            title=f"log-sum-exp: {score.op.level}",
            needs=score.inputs,
            makes=(node.name,),
            buffers=(
                Buffer(
                    name=text.buffer(node.name),
                    dtype="f32",
                    dims=("in_q.shape[0]", str(draft.shape.query_heads), "in_q.shape[1]"),
                    role="level",
                ),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(text.tiles(), str(draft.shape.kv_heads)),
                    arguments=(
                        *draft.tensor("q"),
                        *draft.tensor(score.inputs[1]),
                        *text.strides(text.buffer(node.name)),
                        *draft.seq(context),
                    ),
                ),
            ),
        )
    )
