"""Launches that make vectors of vectors: pools of keys and of queries, and numbers kept in fewer bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hsgen import appending, configs, refusals, rows, sorting, splits, together
from hsgen.graph import (
    Attend,
    Node,
    Norm,
    Pool,
    PoolRows,
    Rotate,
    Round,
)
from hsgen.kernels import (
    POOLS,
    ROUNDED,
    WHOLE,
    Pooled,
    PoolsContext,
    RoundContext,
    SegmentsContext,
    Turn,
    TurnContext,
)
from hsgen.plan import Buffer, Kernel, Launch, Step
from hsgen.schedule import text
from hsgen.schedule.draft import Draft


def make(draft: Draft, node: Node, op: Pool | PoolRows | Rotate | Round) -> None:
    match op:
        case PoolRows():
            _pool_rows(draft, node, op)
        case Pool() if draft.tiers_of(node) or refusals.of_biases(draft.graph, node):
            pass  # launched by what attends, in turns of heads; by what ranks them
        case Pool():
            _pool_keys(draft, node, op)
        case Rotate():
            _turn_rows(draft, node, op)
        case Round() if draft.pool_of(node.name):
            pass  # where they are pooled
        case Round():
            _round(draft, node, op)


def means_of_tiers(draft: Draft) -> None:
    """From here on the graph has the means of each tier, of keys and values, as pools that it reads."""
    made: list[Node] = []
    for node in draft.graph.nodes():
        if not isinstance(node.op, Attend) or node.op.merges is None:
            continue
        of = [
            _means(draft.graph[source], f"{node.op.branch}.{side}_{merge}", merge)
            for merge in node.op.merges
            if merge > 1
            for side, source in zip(("keys", "values"), node.inputs[1:3], strict=True)
        ]
        inputs = (*node.inputs[:4], *(pool.name for pool in of), *node.inputs[4:])
        made += (*of, replace(node, inputs=inputs))
    if made:
        others = {node.name: node for node in (*draft.graph.nodes(), *made)}
        draft.graph = draft.graph.with_nodes(others.values())


def _means(source: Node, name: str, merge: int) -> Node:
    """Means of so many tokens."""
    op = Pool(level=name, how="mean", size=merge, stride=merge, position=False)
    batch, _, *rest = source.type.dims
    return Node(
        name=name,
        op=op,
        inputs=(source.name,),
        type=replace(source.type, dims=(batch, f"S/{merge}", *rest)),
        span=source.span,
    )


def _pool_keys(draft: Draft, node: Node, op: Pool) -> None:
    source, chain = draft.graph[node.inputs[0]], draft.finished(node)
    made = chain[-1].name
    order = sorting.order_of(draft.graph, node)
    norms = tuple(x.inputs[1] for x in chain if isinstance(x.op, Norm))
    turns = tuple(x for x in chain if isinstance(x.op, Rotate))
    rounds = next((x.op.dtype for x in chain if isinstance(x.op, Round)), None)
    by_head = len(source.type.dims) - bool(op.series) == 4
    heads = draft.size(source.type.dims[2]) if by_head else 1
    dim = draft.size(source.type.dims[-1])
    turn = next((turn_of(x.op, dim, "e") for x in chain if isinstance(x.op, Rotate)), None)
    short = draft.entries(op, op.level).short
    assert op.how in POOLS, "refused"
    assert rounds in (None, "bf16", "fp8_unscaled"), "refused"
    context = SegmentsContext(
        name=f"pool_{text.safe(node.name)}",
        heads=heads,
        head_dim=dim,
        size=op.size,
        stride=op.stride,
        short=short,
        how=op.how,
        position=op.position,
        precision=draft.target.dot_precision,
        softmax=op.softmax,
        normed=bool(norms),
        turn=turn,
        append=draft.cached is not None,
        across=draft.steps_alone and op.how == "linear",
        page=draft.page,
        ordered=order is not None,
        before=op.before or 0,
        series=op.series or 0,
        rounds=rounds,
        as_bytes=draft.in_eight(chain[-1]),
    )
    count = f"count_{text.safe(made)}"
    buffer = text.buffer(made)
    config = configs.pool(op, dim, draft.dtype, finishes=len(chain) > 1)
    if context.across:
        config = configs.pool_across(context.slice, draft.dtype)
    names = tuple(x.name for x in chain)
    alike = (name for name, one in draft.merged.items() if one == node.name)  # that it stands for
    kernel = draft.kernel("segments", context, config, *names, *alike)
    tables = tuple(name for x in turns for name in x.inputs[1:])
    gates = node.inputs[1:2] if op.how == "gated" else ()
    arguments = (
        *in_series(draft, source.name, op, draft.tensor(source.name), by_head=by_head),
        *(x for name in gates for x in gates_of(draft, name, op, by_head=by_head)),
        *(text.input_of(name) for name in node.inputs[1 + len(gates) :] if not order),
        *map(text.input_of, norms),
        *(x for name in tables for x in draft.tensor(name)[:3]),
        *(sorting.arguments(text.buffer(order.name)) if order else ()),
        buffer,
        count,
    )
    if context.across:
        most = f"most_{text.safe(made)}"
        draft.appends.append(
            Step(
                title=f"pool: {node.name}",
                needs=(*node.inputs, *norms, *tables),
                makes=names,
                sizes=((most, f"({appending.TOKENS} + {op.stride - 1}) // {op.stride}"),),
                buffers=(),
                launches=(
                    Launch(
                        kernel=kernel,
                        grid=(
                            f"batch.sequences * {most} // {{BLOCK_E}} + 1",
                            str(heads),
                            str(dim // context.slice),
                        ),
                        arguments=(*arguments, most, *rows.page_arguments(draft.page), *text.SEQ),
                    ),
                ),
            )
        )
        return
    if draft.cached:
        tiles, new, step = (f"{of}_{text.safe(made)}" for of in ("tiles", "new", "step"))
        draft.appends.append(
            Step(
                title=f"pool: {node.name}",
                needs=(*node.inputs, *norms, *tables),
                makes=names,
                sizes=(
                    (new, f"{appending.TOKENS} // {op.stride} + 1"),
                    (step, f'config["{kernel}"]["BLOCK_E"]'),
                    (tiles, f"{new} // {step} + 1"),
                ),
                buffers=(),
                launches=(
                    Launch(
                        kernel=kernel,
                        grid=(f"batch.sequences * {tiles}", str(heads)),
                        arguments=(*arguments, tiles, *rows.page_arguments(draft.page), *text.SEQ),
                    ),
                ),
            )
        )
        return
    entries = _whole(source, made, context, arguments)
    draft.steps.append(
        Step(
            title=f"pool: {node.name}",
            needs=(*node.inputs, *norms, *tables),
            makes=names,
            sizes=entries.sizes,
            buffers=(entries.buffer,),
            launches=(entries.launch,),
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Entries: the sizes that say how many, where they are, and what makes them."""

    sizes: tuple[tuple[str, str], ...]
    buffer: Buffer
    launch: Launch

    @property
    def bytes(self) -> int:
        """Of an entry of one head, as if of 16 bits."""
        return 2 * int(self.buffer.dims[-1])


def _whole(
    source: Node, made: str, context: SegmentsContext, arguments: tuple[str, ...], turn: str = ""
) -> Made:
    """The entries of all that a call is given, or of a turn's heads.

    turn: how many heads have one at most.
    """
    x, name, stride = text.input_of(source.name), text.safe(made), context.stride
    length, count, pooled = f"length_{name}", f"count_{name}", f"rows_{name}"
    entries = f"{x}.shape[1] // {stride}"
    if context.short:
        most = f"({x}.shape[1] + {stride - 1}) // {stride}"
        entries = f"{most} + batch.packed * batch.sequences"
    heads = str(context.heads)
    sizes = (
        (length, entries),
        (count, f"{int(context.short)} if batch.packed else {length}"),
        (pooled, f"{x}.shape[0] * {length}"),
    )
    buffer = Buffer(
        name=text.buffer(made),
        dtype="e4m3" if context.as_bytes else "input",
        dims=(f"{x}.shape[0]", length, turn or heads, str(context.width)),
        role="list" if turn else "level",
    )
    block_e = "{BLOCK_E}"
    if turn:
        block_e = f"step_{name}"
        sizes += ((block_e, f'config["{context.name}"]["BLOCK_E"]'),)
    launch = Launch(
        kernel=context.name,
        grid=(f"{pooled} // {block_e} + batch.sequences", "count" if turn else heads),
        arguments=(*arguments, *text.SEQ, *(("tile_first",) if turn else ())),
    )
    return Made(sizes=sizes, buffer=buffer, launch=launch)


def means_of_turn(draft: Draft, node: Node, turn: str) -> Made:
    """The means that a branch reads in a tier, of a turn's heads, `turn` at most."""
    assert isinstance(node.op, Pool)
    op, source = node.op, draft.graph[node.inputs[0]]
    heads, dim = (draft.size(name) for name in source.type.dims[2:])
    context = SegmentsContext(
        name=f"pool_{text.safe(node.name)}",
        how="mean",
        heads=heads,
        head_dim=dim,
        size=op.size,
        stride=op.stride,
        short=True,
        by_turns=True,
    )
    config = configs.pool(op, dim, draft.dtype)
    draft.kernel("segments", context, config, *draft.tiers_of(node))
    arguments = (
        *draft.tensor(source.name),
        text.buffer(node.name),
        f"count_{text.safe(node.name)}",
    )
    return _whole(source, node.name, context, arguments, turn)


def pools_beside(draft: Draft) -> None:
    """Pools of a step whose tiles are alike have one launch: one waits for weights beside the other."""
    of = {kernel.name: kernel for kernel in draft.kernels}
    found: list[tuple[Kernel, SegmentsContext, Step]] = []
    for step in draft.appends:
        kernel = of[step.launches[0].kernel]
        context = kernel.context
        if not isinstance(context, SegmentsContext) or not context.across:
            continue
        _, first, before = found[0] if found else (kernel, context, step)
        alike = (first.stride, first.heads) == (context.stride, context.heads)
        if alike and not set(step.needs) & set(before.makes):
            found.append((kernel, context, step))
    if len(found) < 2:
        return
    kernels, contexts, steps = zip(*found, strict=True)
    most = steps[0].sizes
    first, *others = (step.launches[0] for step in steps)
    renamed = tuple(
        replace(x, arguments=tuple(most[0][0] if a == step.sizes[0][0] else a for a in x.arguments))
        for x, step in zip(others, steps[1:], strict=True)
    )
    launches = (first, *renamed)
    params, arguments, names = splits.side_by_side([x.params for x in contexts], launches)
    pools = tuple(
        Pooled(
            pool=replace(x, columns_of="part"),
            arguments=tuple(own),
            programs=int(launch.grid[2]),
        )
        for x, own, launch in zip(contexts, names, launches, strict=True)
    )
    tunables = {p.name: p for x in contexts for p in x.params if p.kind == "constexpr"}
    name = "pools"
    kernel = Kernel(
        name=name,
        skeleton="segments",
        context=PoolsContext(name=name, pools=pools, params=(*params.values(), *tunables.values())),
        config=configs.pool_across(min(x.slice for x in contexts), draft.dtype),
        operators=tuple(x for each in kernels for x in each.operators),
    )
    step = Step(
        title=", ".join(step.title for step in steps),
        needs=tuple(dict.fromkeys(x for step in steps for x in step.needs)),
        makes=tuple(x for step in steps for x in step.makes),
        sizes=most,
        buffers=(),
        launches=(
            Launch(
                kernel=name,
                grid=(*first.grid[:2], str(sum(each.programs for each in pools))),
                arguments=tuple(arguments.values()),
            ),
        ),
    )
    draft.kernels = [*(x for x in draft.kernels if x not in kernels), kernel]
    draft.appends = [*(x for x in draft.appends if x not in steps), step]


def gates_of(draft: Draft, name: str, op: Pool, *, by_head: bool) -> tuple[str, ...]:
    """Gates and their batch, token and head strides, and that of series; an index has no heads."""
    head = f"{text.input_of(name)}.stride(2)" if by_head else "0"
    return in_series(draft, name, op, (*draft.tensor(name)[:3], head), by_head=by_head)


def in_series(
    draft: Draft, name: str, op: Pool, strides: tuple[str, ...], *, by_head: bool
) -> tuple[str, ...]:
    """A tensor and its strides, with that of series behind the head's, where tokens have several."""
    if op.series is None:
        return strides
    x = text.input_of(name)
    head, series = (f"{x}.stride(2)", f"{x}.stride(3)") if by_head else ("0", f"{x}.stride(2)")
    return (*draft.tensor(name)[:3], head, series)


def _pool_rows(draft: Draft, node: Node, op: PoolRows) -> None:
    """One query for the rows of a block, kept in float32."""
    assert op.block is not None, "refused"
    assert op.how in ("mean", "max"), "refused"
    source, chain = draft.graph[node.inputs[0]], draft.finished(node)
    heads, dim = (draft.size(name) for name in source.type.dims[2:])
    turns = tuple(x for x in chain if isinstance(x.op, Rotate))
    turn = next((turn_of(x.op, dim, "p") for x in turns if isinstance(x.op, Rotate)), None)
    tables = tuple(name for x in turns for name in x.inputs[1:])
    context = SegmentsContext(
        name=f"pool_{text.safe(node.name)}",
        heads=heads,
        head_dim=dim,
        size=op.block,
        stride=op.block,
        how=op.how,
        rows=op.block,
        precision=draft.target.dot_precision,
        turn=turn,
    )
    names, made = tuple(x.name for x in chain), chain[-1].name
    config = configs.pool_rows(op.block, turns=turn is not None)
    kernel = draft.kernel("segments", context, config, *names)
    count, buffer = f"blocks_{text.safe(node.name)}", text.buffer(made)
    draft.steps.append(
        Step(
            title=f"pool: {node.name}",
            needs=(*node.inputs, *tables),
            makes=names,
            sizes=((count, together.blocks_of(op.block)),),
            buffers=(
                Buffer(name=buffer, dtype="f32", dims=(count, str(heads), str(dim)), role="level"),
            ),
            launches=(
                Launch(
                    kernel=kernel,
                    grid=(f"{count} // {{BLOCK_E}} + batch.sequences", str(heads)),
                    arguments=(
                        *draft.tensor(source.name),
                        *(x for name in tables for x in draft.tensor(name)[:3]),
                        buffer,
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )


def _turn_rows(draft: Draft, node: Node, op: Rotate) -> None:
    """Queries that score row by row, each turned by its position.

    Keys, and queries of blocks, are turned where they are pooled.
    """
    source, buffer = draft.graph[node.inputs[0]], text.buffer(node.name)
    if op.rows is None or op.at != "token":
        return
    heads, dim = (draft.size(name) for name in source.type.dims[2:])
    context = TurnContext(
        name=f"turn_{text.safe(source.name)}",
        heads=heads,
        head_dim=dim,
        turn=turn_of(op, dim, "p"),
        page=draft.page if op.base is None else 0,
    )
    kernel = draft.kernel("segments", context, configs.turning(dim), node.name)
    x = text.input_of(source.name)
    shape = (f"{x}.shape[0]", f"{x}.shape[1]", str(heads), str(dim))
    draft.steps.append(
        Step(
            title=f"turn: {source.name}",
            needs=node.inputs,
            makes=(node.name,),
            sizes=(),
            buffers=(Buffer(name=buffer, dtype="input", dims=shape, role="level"),),
            launches=(
                Launch(
                    kernel=kernel,
                    grid=(text.tiles(), str(heads)),
                    arguments=(
                        *draft.tensor(source.name),
                        *(x for name in node.inputs[1:] for x in draft.tensor(name)[:3]),
                        buffer,
                        *rows.page_arguments(context.page),
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )


def _round(draft: Draft, node: Node, op: Round) -> None:
    """Vectors of the caller, each kept in fewer bits; by rows, whatever sequences they are of."""
    assert op.dtype in (*ROUNDED, *WHOLE), "refused"
    source, buffer = node.inputs[0], text.buffer(node.name)
    x, name = text.input_of(source), text.safe(node.name)
    dims = [draft.size(dim) for dim in node.type.dims[2:]]
    heads = dims[0] if len(dims) == 2 else 1
    eight = draft.in_eight(node)
    context = RoundContext(
        name=f"round_{text.safe(source)}",
        dtype=op.dtype,
        heads=heads,
        head_dim=dims[-1],
        as_bytes=eight,
    )
    shape = (f"{x}.shape[0]", f"{x}.shape[1]", *map(str, dims))
    kept = [Buffer(name=buffer, dtype="e4m3" if eight else "input", dims=shape, role="level")]
    if context.scaled:
        kept.append(Buffer(name=draft.power(node), dtype="f32", dims=shape[:-1], role="level"))
    kernel = draft.kernel("segments", context, configs.rounding(dims[-1]), node.name)
    rows_of = f"{x}.shape[0] * {x}.shape[1]"
    draft.steps.append(
        Step(
            title=f"round: {source}",
            needs=node.inputs,
            makes=(node.name,),
            sizes=((f"vectors_{name}", f"{rows_of} * {heads}"),),
            buffers=tuple(kept),
            launches=(
                Launch(
                    kernel=kernel,
                    grid=(f"vectors_{name} // {{BLOCK_V}} + 1", "1"),
                    arguments=(
                        *draft.tensor(source),
                        *(each.name for each in kept),
                        f"{x}.shape[1]",
                        f"vectors_{name}",
                    ),
                ),
            ),
        )
    )


def turn_of(op: Rotate, dim: int, of: str) -> Turn:
    """Where RoPE turns which channels of entries `e`, or of queries at places that have a name."""
    first = of if op.rows is not None else f"{of} * {op.stride}"
    return Turn(
        start=0 if op.channels == "first" else dim - op.dims,
        dims=op.dims,
        halves=op.pairs == "halves",
        position=f"({first} + {(op.size - 1) / 2 - (op.before or 0)})"
        if op.at == "centre"
        else first,
        frequency="" if op.base is None else rows.number(-2 / op.dims * math.log2(op.base)),
    )
