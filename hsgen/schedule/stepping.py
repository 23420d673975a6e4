"""Launches of a few rows behind a cache: shares of the keys, and lists of single rows."""

from __future__ import annotations

from hsgen import rows, splits
from hsgen.errors import PlanError
from hsgen.graph import Attend, Node, Score, SelectSet
from hsgen.kernels import UniteContext
from hsgen.plan import Buffer, Config, Kernel, Launch
from hsgen.rows import RowsContext, next_power
from hsgen.schedule import text
from hsgen.schedule.draft import SORT_LIMIT, Draft

MOST_MEMBERS = 8  # heads of a group whose lists are walked as one: bits of an entry


def attend(draft: Draft, node: Node, op: Attend) -> None:
    """A branch whose keys are shared by several programs, with one merge behind it."""
    scale = op.scale if op.scale is not None else 1.0
    context, keys = _walk(draft, node, op, scale)
    context = rows.with_logits(context, scale=scale, softcap=op.softcap, sink=False)
    alone = context.one_token
    selection = (text.buffer(node.inputs[3]),) if alone else ()
    lists = ()
    if context.united:
        lists = (_united(draft, node, op),)
        selection = (lists[0][2].name,)
    tiles, sizes = text.step_tiles(rows.with_split(context)), ()
    if context.parts:
        there, tiles = tiles, f"row_tiles_{op.branch}"
        sizes = ((tiles, text.tiles_of(context.name, there)), *text.parts(context))
    _share(
        draft,
        context,
        splits.Branch(
            name=op.branch,
            title=f"attend: {op.branch}",
            needs=draft.needs(node, *node.inputs),
            makes=draft.makes(node),
            buffers=draft.output_buffers(node),
            arguments=(*draft.tensors(node, op), *selection),
            more=draft.seq(context),
            outputs=draft.outputs(node),
            query_heads=draft.shape.query_heads,
            grid=text.grid(draft.shape, context, tiles),
            sizes=sizes,
            alone=alone,
            keys=keys,
            sms=draft.target.sms,
            sink=draft.sink(node) is not None,
            turn=draft.turn(node),
            lists=lists,
        ),
    )


def _walk(draft: Draft, node: Node, op: Attend, scale: float) -> tuple[RowsContext, str]:
    """The loops of a branch, and how many keys they may walk."""
    name, shape = f"attend_{op.branch}", draft.shape_of(op)
    match op.over:
        case "window":
            window = op.window or 1
            context = rows.attend_window(shape, name=name, scale=scale, window=window)
            return rows.with_pages(context, draft.page), str(window)
        case "all":
            context = rows.attend_all(shape, name=name, scale=scale)
            return rows.with_pages(context, draft.page), "batch.keys"
        case "pooled":
            entries = draft.pooled_entries(node.inputs[1])
            context = rows.attend_pooled(
                shape, name=name, scale=scale, entries=entries, values=True
            )
            return context, text.per_stride("batch.keys", entries.stride)
        case "tokens" | "blocks":
            return _lists(draft, node, op, scale)
        case "static" | "tiers" | "spans":
            raise AssertionError("refused")


def _lists(draft: Draft, node: Node, op: Attend, scale: float) -> tuple[RowsContext, str]:
    """Each row's own list: few rows share too little for a union to pay, but the heads of a group do."""
    selection = draft.graph[node.inputs[3]]
    if isinstance(selection.op, SelectSet) or op.size != op.stride:
        what = "overlapping blocks" if op.size != op.stride else "selections whose counts vary"
        raise PlanError(f"branch {op.branch}: no kernel decodes {what} yet", span=node.span)
    size = op.size if op.over == "blocks" else 1
    width, shape = draft.width(selection), draft.shape_of(op)
    share = selection.type.dims[2]
    pairs = next_power(shape.group) * next_power(width)
    if (
        share == "Hq"
        and op.over == "blocks"
        and 1 < shape.group <= MOST_MEMBERS
        and pairs <= SORT_LIMIT
    ):
        context = rows.attend_united(
            shape, name=f"attend_{op.branch}", scale=scale, width=width, size=size
        )
        return rows.with_pages(context, draft.page), str(width * shape.group * size)
    context = rows.attend_tokens(
        shape,
        name=f"attend_{op.branch}",
        scale=scale,
        width=width,
        share=share,
        alone=True,
        size=size,
    )
    return rows.with_pages(context, draft.page), str(width * size)


def _united(draft: Draft, node: Node, op: Attend) -> tuple[Kernel, Launch, Buffer]:
    """What makes one list of those that the heads of a group have."""
    selection, shape = draft.graph[node.inputs[3]], draft.shape_of(op)
    width, chosen = draft.width(selection), text.buffer(selection.name)
    context = UniteContext(
        name=f"unite_{op.branch}",
        kv_heads=shape.kv_heads,
        group=shape.group,
        width=width,
        size=op.size,
        causal=shape.causal,
    )
    config = Config(constexprs=(), num_warps=1 if context.pairs <= 128 else 4, num_stages=1)
    kernel = Kernel(
        name=context.name,
        skeleton="index",
        context=context,
        config=config,
        operators=draft.makes(node),
    )
    lists = Buffer(
        name=f"lists_{op.branch}",
        dtype="i32",
        dims=("batch.rows", str(shape.kv_heads), str(1 + width * shape.group)),
        role="list",
    )
    launch = Launch(
        kernel=context.name,
        grid=("batch.sequences", str(shape.kv_heads), text.STEP_ROWS),
        arguments=(
            *text.strides(chosen),
            f"{chosen}.stride(3)",
            lists.name,
            *text.SEQ,
        ),
    )
    return kernel, launch, lists


def log_sum_exp(draft: Draft, node: Node, score: Node) -> None:
    """The softmax sum of a level's scores."""
    assert isinstance(score.op, Score)
    entries = draft.pooled_entries(score.inputs[1])
    context = rows.attend_pooled(
        draft.shape,
        name=f"lse_{score.op.level}",
        scale=score.op.scale or 1.0,
        entries=entries,
        values=False,
    )
    lse = Buffer(
        name=text.buffer(node.name),
        dtype="f32",
        dims=("in_q.shape[0]", str(draft.shape.query_heads), "in_q.shape[1]"),
        role="level",
    )
    _share(
        draft,
        context,
        splits.Branch(
            name=score.op.level,
            title=f"log-sum-exp: {score.op.level}",
            needs=score.inputs,
            makes=(node.name,),
            buffers=(lse,),
            arguments=(*draft.tensor("q"), *draft.tensor(score.inputs[1])),
            more=text.SEQ,
            outputs=text.strides(lse.name),
            query_heads=draft.shape.query_heads,
            grid=(text.step_tiles(rows.with_split(context)), str(draft.shape.kv_heads)),
            sizes=(),
            alone=False,
            keys=text.per_stride("batch.keys", entries.stride),
            sms=draft.target.sms,
            sink=False,
            turn=None,
        ),
    )


def _share(draft: Draft, context: RowsContext, branch: splits.Branch) -> None:
    kernels, step = splits.plan(context, branch, draft.row_tiles.step)
    draft.kernels += kernels
    draft.steps.append(step)
