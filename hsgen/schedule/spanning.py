"""Launches of attention to spans: what spans there are, what the window gives, and rows block by block."""

from __future__ import annotations

from dataclasses import replace

from hsgen import buckets, rows, stripes
from hsgen.graph import Attend, Node, Score
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import Entries, next_power
from hsgen.schedule import text
from hsgen.schedule.draft import Draft


def attend(draft: Draft, node: Node, op: Attend) -> None:
    """Spans of the anchors that each row chose, a softmax each, and the mean of these."""
    assert op.spans is not None
    starts, found, weights = _find(draft, node, op)
    near = _window(draft, node, op)
    shape, scale = _shape(draft), op.scale if op.scale is not None else 1.0
    width = draft.width(draft.graph[node.inputs[3]])
    branch = buckets.Branch(
        name=op.branch,
        needs=(*node.inputs[:3], found, *near),
        makes=draft.makes(node),
        selection=starts,
        keys=text.input_of(node.inputs[1]),
        tensors=draft.tensors(node, op),
        outputs=draft.outputs(node),
        buffers=() if near else draft.output_buffers(node),
        width=width,
        entries=Entries(size=stripes.STRIDE, stride=stripes.STRIDE),
        scale=scale,
        softcap=op.softcap,
        sink=False,
        turn=None,
    )
    context = stripes.attend(
        shape, name=f"attend_{op.branch}", scale=scale, width=width, window=op.spans.window
    )
    context = rows.with_logits(context, scale=scale, softcap=op.softcap, sink=False)
    merge = stripes.MeansContext(
        name=f"merge_{op.branch}",
        heads=shape.query_heads,
        width=width,
        window=bool(near),
        head_dim=shape.v,
    )
    beside = buckets.Beside(
        listed=(f"spans_{op.branch}",),
        sums=(f"part_own_{op.branch}",),
        merged=(weights,),
        items=f"max(1, batch.rows * {width})",
    )
    config = draft.row_tiles.attend(context, limit=64)
    kernels, step = buckets.planned(shape, branch, context, config, merge, beside)
    draft.add(kernels, (step,))


def _shape(draft: Draft) -> rows.Shape:
    """Of what lies behind rows."""
    return replace(draft.shape, causal=True)


def _find(draft: Draft, node: Node, op: Attend) -> tuple[str, str, str]:
    """What spans each row has and what they weigh.  -> where they begin, what is made, and the weights"""
    assert op.spans is not None
    selection, score = draft.graph.operands(node)[3:5]
    assert isinstance(score.op, Score)
    shape, width = _shape(draft), draft.width(selection)
    heads = str(shape.query_heads)
    context = stripes.SpansContext(
        name=f"find_{op.branch}",
        shape=shape,
        width=width,
        spans=op.spans,
        scale=score.op.scale if score.op.scale is not None else 1.0,
    )
    values = (("BLOCK_R", max(1, stripes.ROWS // next_power(width))),)
    config = Config(constexprs=values, num_warps=4, num_stages=1)
    draft.kernel("index", context, config, node.name, by_slot=True)
    starts, spans, weights = (f"{x}_{op.branch}" for x in ("starts_of", "spans", "weights"))
    dims = ("batch.rows", heads, str(width))
    made = f"{node.name}.spans"
    draft.steps.append(
        Step(
            title=f"spans: {op.branch}",
            needs=(*score.inputs, selection.name),
            makes=(made,),
            buffers=(
                Buffer(name=starts, dtype="i32", dims=dims, role="list"),
                Buffer(name=spans, dtype="i32", dims=(*dims, "3"), role="list"),
                Buffer(name=weights, dtype="f32", dims=dims, role="list"),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=("batch.rows // {BLOCK_R} + batch.sequences", heads),
                    arguments=(
                        *draft.tensor(score.inputs[0]),
                        *draft.tensor(score.inputs[1]),
                        text.buffer(selection.name),
                        starts,
                        spans,
                        weights,
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )
    return starts, made, weights


def _window(draft: Draft, node: Node, op: Attend) -> tuple[str, ...]:
    """The output and the log-sum-exp become those of the window, which all spans have beside theirs."""
    assert op.spans is not None
    if not op.spans.window:
        return ()
    shape, scale = _shape(draft), op.scale if op.scale is not None else 1.0
    name, made = f"near_{op.branch}", f"{node.name}.near"
    context = rows.attend_window(shape, name=name, scale=scale, window=op.spans.window)
    context = rows.with_logits(context, scale=scale, softcap=op.softcap, sink=False)
    draft.attend(context, draft.tiles(context, limit=128), node.name)
    launch = Launch(
        kernel=name,
        grid=text.grid(shape, context, text.tiles(context)),
        arguments=(*draft.tensors(node, op), *draft.outputs(node), *draft.seq(context)),
    )
    draft.steps.append(
        Step(
            title=f"attend: {op.branch}, the window",
            needs=node.inputs[:3],
            makes=(made,),
            buffers=draft.output_buffers(node),
            launches=(draft.launch(launch),),
        )
    )
    return (made,)
