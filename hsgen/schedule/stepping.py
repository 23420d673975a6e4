"""Launches of a few rows behind a cache: shares of the keys, and lists of single rows."""

from __future__ import annotations

from hsgen import patterns, rows, splits
from hsgen.errors import PlanError
from hsgen.graph import Attend, Node, Normalise, Recall, Score, SelectSet, left_to_window
from hsgen.kernels import UniteContext
from hsgen.plan import Buffer, Config, Kernel, Launch, Step
from hsgen.rows import RowsContext, next_power
from hsgen.schedule import choosing, text
from hsgen.schedule.draft import SORT_LIMIT, Draft, Left, Turn

FEW = 8  # rows of a sequence, at most, that a step has
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
        selection = (lists[0][2][0].name,)
    chosen = choice_of(draft, node)
    sizes: tuple[tuple[str, str], ...] = ()
    apart, logits, more = _apart(draft), (), draft.seq(context)
    if chosen is not None:
        left, scoring = _left(draft, node, op, *chosen, apart=apart)
        context = rows.with_logits_left(context, scoring, causal=draft.shape.causal)
        entries = scoring.target if scoring.folded else scoring.entries
        most = f"({text.per_stride('batch.keys', entries.stride)} + 4) // 4 * 4"
        sizes = ((left.length, f"{most} * {left.planes}" if left.planes > 1 else most),)
        dims = ("batch.rows", *map(str, (draft.shape.kv_heads, draft.shape.group)))
        logits = (Buffer(name=left.buffer, dtype="f32", dims=(*dims, left.length), role="list"),)
        more = (left.buffer, left.length, *more)
    tiles = text.step_tiles(rows.with_split(context))
    if context.parts:
        there, tiles = tiles, f"row_tiles_{op.branch}"
        sizes += ((tiles, text.tiles_of(context.name, there)), *text.parts(context))
    turn = draft.turns.get(node.name)
    _share(
        draft,
        context,
        splits.Branch(
            name=op.branch,
            title=f"attend: {op.branch}",
            needs=node.inputs if apart else draft.needs(node, *node.inputs),
            makes=(parts_of(node),) if apart else draft.makes(node),
            computes=(node.name, *draft.lse_of(node)),
            apart=apart,
            logits=logits,
            buffers=() if apart else draft.output_buffers(node),
            arguments=(*draft.tensors(node, op), *selection),
            more=more,
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
    if turn is not None and apart:
        draft.parts[node.name] = _part(draft, node, turn)
        _merge(draft, turn)


def _apart(draft: Draft) -> bool:
    """Whether the parts of all branches are merged at once: under gates, if no choice needs one before."""
    for name, turn in draft.turns.items():
        node = draft.graph[name]
        readers = {x.name for lse in draft.lse_of(node) for x in draft.graph.users(lse)}
        chosen = choice_of(draft, node)
        if not isinstance(turn.how, rows.Gated) or len(readers) > (chosen is not None):
            return False
    return bool(draft.turns)


def parts_of(node: Node) -> str:
    """What a step is said to make of which another one merges the parts."""
    return f"{node.name}.parts"


def choice_of(draft: Draft, node: Node) -> tuple[Node, rows.Scoring] | None:
    """The one selection that is made of what a branch attends by, and how its scores come of that.

    They are weights by the branch's own log-sum-exp, summed over a group's heads, as they are or summed
    into entries that are no shorter: then whichever is complete has an own source that is.
    """
    graph, found = draft.graph, list[tuple[Node, rows.Scoring]]()
    for lse in draft.lse_of(node):
        for user in graph.users(lse):
            score = graph[user.inputs[0]]
            alike = isinstance(score.op, Score) and score.op.form == "dot"
            if isinstance(user.op, Normalise) and alike and score.inputs[:2] == node.inputs[:2]:
                found += choosing.summed_scores(draft, user)
    if len(found) != 1 or draft.pool_of(node.inputs[1]) is None:
        return None
    scoring = found[0][1]
    folds = scoring.folded and scoring.entries.size <= scoring.target.stride
    summed = scoring.reduce == "sum" and scoring.map_how != "max"
    as_it_is = not scoring.map_how or (scoring.taps == ((0, 1),) and scoring.ratio == 1)
    return found[0] if summed and (folds or as_it_is) else None


def _left(
    draft: Draft, node: Node, op: Attend, selection: Node, scoring: rows.Scoring, *, apart: bool
) -> tuple[Left, rows.Scoring]:
    """What a branch leaves for a selection, which is told of it."""
    left = Left(
        kernel=f"attend_{op.branch}",
        step=parts_of(node) if apart else draft.lse_of(node)[0],
        buffer=f"logits_{op.branch}",
        length=f"length_{op.branch}",
        planes=scoring.planes,
    )
    draft.left[selection.name] = left
    return left, scoring


def _part(draft: Draft, node: Node, turn: Turn) -> splits.Part:
    """A branch whose parts are merged with those of the others."""
    assert isinstance(node.op, Attend)
    assert isinstance(turn.how, rows.Gated)
    sink = draft.sink(node)
    lse = draft.output_buffers(node)[-1]
    return splits.Part(
        name=f"attend_{node.op.branch}",
        branch=node.op.branch,
        step=parts_of(node),
        column=turn.how.column,
        sink=sink or "",
        outputs=text.strides(lse.name),
        buffers=(lse,),
        makes=(node.name, *draft.lse_of(node)),
    )


def _merge(draft: Draft, turn: Turn) -> None:
    """Once all branches are planned, the launch that merges them."""
    assert isinstance(turn.how, rows.Gated)
    assert turn.reads is not None
    if len(draft.parts) < turn.how.branches:
        return
    _beside(draft)
    rows_of = ("in_q.shape[0]", "in_q.shape[1]", str(draft.shape.query_heads))
    o = Buffer(
        name=text.buffer(turn.total),
        dtype="input",
        dims=(*rows_of, str(draft.shape.v)),
        role="output",
    )
    kernel, step = splits.merge(
        tuple(draft.parts.values()),
        heads=draft.shape.query_heads,
        head_dim=draft.shape.v,
        gates=turn.reads,
        total=turn.total,
        o=o,
    )
    draft.kernels.append(kernel)
    draft.steps.append(step)


def _beside(draft: Draft) -> None:
    """Branches that no choice waits for walk their keys in one launch, if their tiles are alike."""
    attends = {part.step: f"attend_{part.branch}" for part in draft.parts.values()}
    found: list[tuple[Kernel, Step]] = []
    for step in draft.steps:
        kernel = next((k for k in draft.kernels if k.name == attends.get(step.makes[0])), None)
        if kernel is None or not isinstance(kernel.context, RowsContext):
            continue
        first = found[0] if found else (kernel, step)
        alike = kernel.config == first[0].config and kernel.context.alike
        heads = step.launches[-1].grid[1] == first[1].launches[-1].grid[1]
        if alike and heads and not kernel.context.leaves:
            found.append((kernel, step))
    if len(found) < 2:
        return
    kernels, steps = zip(*found, strict=True)
    kernel, step = splits.beside(kernels, steps)
    draft.kernels = [*(x for x in draft.kernels if x not in kernels), kernel]
    draft.steps = [*(x for x in draft.steps if x not in steps), step]


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
            if draft.chosen(node):
                return _entries(draft, node, op, entries)
            context = rows.attend_pooled(
                shape, name=name, scale=scale, entries=entries, values=True
            )
            return context, text.per_stride("batch.keys", entries.stride)
        case "tokens" | "blocks":
            return _lists(draft, node, op, scale)
        case "static":
            return _pattern(draft, node, op)
        case "tiers" | "spans":
            raise AssertionError("refused")


def _entries(
    draft: Draft, node: Node, op: Attend, entries: rows.Entries
) -> tuple[RowsContext, str]:
    """Each row's own list of pooled entries."""
    selection = draft.graph[node.inputs[3]]
    width = draft.width(selection)
    context = rows.attend_tokens(
        draft.shape_of(op),
        name=f"attend_{op.branch}",
        scale=op.scale if op.scale is not None else 1.0,
        width=width,
        share=selection.type.dims[2],
        alone=True,
        entries=entries,
    )
    return context, str(width)


def _pattern(draft: Draft, node: Node, op: Attend) -> tuple[RowsContext, str]:
    """What a pattern shows, to one head of those that see different units.

    A step has a few rows, which lie in two units at most.
    """
    rule = patterns.rule_of(op)
    if 0 < rule.most_tokens < FEW:
        what = f"distances in units of fewer than {FEW} tokens"
        raise PlanError(f"branch {op.branch}: no kernel decodes {what} yet", span=node.span)
    shape = draft.shape_of(op)
    context = patterns.attend(shape, op, name=f"attend_{op.branch}")
    return rows.with_pages(context, draft.page), rule.keys("batch.keys")


def _lists(draft: Draft, node: Node, op: Attend, scale: float) -> tuple[RowsContext, str]:
    """Each row's own list: few rows share too little for a union to pay, but the heads of a group do."""
    selection = draft.graph[node.inputs[3]]
    if isinstance(selection.op, Recall) and selection.op.block:
        what = "what blocks of rows chose"
        raise PlanError(f"branch {op.branch}: no kernel decodes {what} yet", span=node.span)
    if isinstance(selection.op, SelectSet) or op.size != op.stride:
        what = "overlapping blocks" if op.size != op.stride else "selections whose counts vary"
        raise PlanError(f"branch {op.branch}: no kernel decodes {what} yet", span=node.span)
    size = op.size if op.over == "blocks" else 1
    width, shape = draft.width(selection), draft.shape_of(op)
    share, window = selection.type.dims[2], left_to_window(draft.graph, node)
    pairs = next_power(shape.group) * next_power(width)
    if (
        share == "Hq"
        and op.over == "blocks"
        and 1 < shape.group <= MOST_MEMBERS
        and pairs <= SORT_LIMIT
    ):
        context = rows.attend_united(
            shape,
            name=f"attend_{op.branch}",
            scale=scale,
            width=width,
            size=size,
            window=window,
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
        window=window,
    )
    return rows.with_pages(context, draft.page), str(width * size)


def _united(draft: Draft, node: Node, op: Attend) -> tuple[Kernel, Launch, tuple[Buffer, ...]]:
    """What makes one list of those that the heads of a group have: the first of the buffers."""
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
    length = f"({text.per_stride('batch.keys', op.size)} + 4) // 4 * 4"
    dims = ("batch.rows", str(shape.kv_heads), length)
    marks = Buffer(name=f"marks_{op.branch}", dtype="i32", dims=dims, role="list")
    launch = Launch(
        kernel=context.name,
        grid=("batch.sequences", str(shape.kv_heads), text.STEP_ROWS),
        arguments=(
            *text.strides(chosen),
            f"{chosen}.stride(3)",
            lists.name,
            *((marks.name, length) if context.marked else ()),
            *text.SEQ[:1],
        ),
    )
    return kernel, launch, (lists, marks) if context.marked else (lists,)


def log_sum_exp_of(draft: Draft, score: Node) -> RowsContext:
    """The loops of a level's softmax sum: over its entries, or over tokens."""
    assert isinstance(score.op, Score)
    name, scale = f"lse_{score.op.level}", score.op.scale or 1.0
    if draft.pool_of(score.inputs[1]) is None:
        context = rows.log_sum_exp_of_all(draft.shape, name=name, scale=scale)
        return rows.with_pages(context, draft.page)
    entries = draft.pooled_entries(score.inputs[1])
    return rows.attend_pooled(draft.shape, name=name, scale=scale, entries=entries, values=False)


def log_sum_exp(draft: Draft, node: Node, score: Node) -> None:
    """The softmax sum of a level's scores."""
    assert isinstance(score.op, Score)
    context = log_sum_exp_of(draft, score)
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
            more=draft.seq(context),
            outputs=text.strides(lse.name),
            query_heads=draft.shape.query_heads,
            grid=(text.step_tiles(rows.with_split(context)), str(draft.shape.kv_heads)),
            sizes=(),
            alone=False,
            keys=text.per_stride("batch.keys", score.op.stride),
            sms=draft.target.sms,
            sink=False,
            turn=None,
        ),
    )


def _share(draft: Draft, context: RowsContext, branch: splits.Branch) -> None:
    kernels, step = splits.plan(context, branch, draft.row_tiles.step)
    draft.kernels += kernels
    draft.steps.append(step)
