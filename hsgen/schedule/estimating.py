"""Launches of a choice by estimates: keys as whole numbers, and what each block of rows keeps."""

from __future__ import annotations

from hsgen import configs, together
from hsgen.estimates import EstimateContext, Way
from hsgen.graph import Node, Score, SelectSet
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import choosing, text
from hsgen.schedule.draft import Draft


def words_of(selection: Node) -> str:
    """Words of what a block of rows keeps, in the driver."""
    assert isinstance(selection.op, SelectSet)
    return f"words_{selection.op.level}"


def select(draft: Draft, node: Node, op: SelectSet, way: Way) -> None:
    """Go through the keys once, block of rows by block of rows, behind the branch whose sum decides."""
    shape, level, keys = draft.shape, op.level, way.keys
    assert isinstance(way.score.op, Score)
    context = EstimateContext(
        name=f"choose_{level}",
        heads=shape.query_heads,
        group=shape.group,
        head_dim=shape.qk,
        rows=way.rows,
        size=op.size,
        levels=way.levels,
        threshold=op.value,
        scale=way.score.op.scale or 1.0,
        precision=shape.precision,
    )
    config = configs.estimate(context, draft.target, draft.dtype)
    draft.kernel("maps", context, config, *way.inside, node.name)
    part = choosing.part_of(draft.graph, node)
    assert part is not None, "refused"
    made, heads, blocks = choosing.chosen_of(node), str(shape.query_heads), f"blocks_{level}"
    bits, words = text.buffer(made), words_of(node)
    scale = draft.power(keys)
    strides = tuple(f"{scale}.stride({dim})" for dim in (1, 2))
    summed = draft.graph[way.lse.inputs[0]]
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=("q", keys.name, way.lse.name),
            makes=(made,),
            sizes=(
                (blocks, together.blocks_of(way.rows)),
                *part.sizes(level),
                (words, f"(entries_{level} + 31) // 32"),
            ),
            buffers=(Buffer(name=bits, dtype="i32", dims=(blocks, heads, words), role="list"),),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(f"{blocks} + batch.sequences", heads),
                    arguments=(
                        *draft.tensor("q"),
                        *draft.tensor(keys.name),
                        *(scale, f"0 if batch.packed else {scale}.stride(0)", *strides),
                        *text.strides(draft.log_sum_exp(summed)),
                        bits,
                        words,
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )
    choosing.spread(draft, node, op, shape.query_heads, way.rows, bits=words)
