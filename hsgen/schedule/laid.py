"""Launches of a graph whose entries are tiles of axes: where tokens are, keys in slots, and means of tiles.

Steps are written as if slots were all there is: behind the order of slots the driver's `batch` says where
sequences lie among these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from hsgen import axes, rows, together
from hsgen.axes import CopyContext, OrderContext, RoomsContext
from hsgen.errors import PlanError
from hsgen.graph import (
    Attend,
    Cluster,
    Input,
    Node,
    OutputGate,
    Permute,
    Pool,
    PoolRows,
    Reduce,
    Score,
)
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import next_power
from hsgen.schedule import text
from hsgen.schedule.draft import Draft

KEYS_SHARE = Fraction(1, 6)  # of what a call is given, that a turn's keys and values may have
MOST_TURNS = 8
TOKENS = "of_tokens"  # the batch as it came
SLOTS = "from here on: rows and keys are slots"


def begin(draft: Draft) -> None:
    """From here on the graph has its tiles in slots, where it has any."""
    draft.tiling = axes.tiling_of(draft.graph)
    if draft.tiling is None:
        return
    if draft.cached is not None:
        raise PlanError("no kernel lays tiles of axes behind a cache")
    draft.graph, draft.merged = axes.in_slots(draft.graph)


def launched(draft: Draft, node: Node) -> bool:
    """Launch what a node of tiles needs, where it is one."""
    if draft.tiling is None:
        return False
    match node.op:
        case Cluster():
            order(draft, node)
        case Permute():
            pass  # launched by what attends, in turns of heads
        case Pool() if _left_by_copies(draft, node):
            pass
        case Pool() | PoolRows():
            means(
                draft,
                node.inputs[0],
                node.name,
                of_rows=isinstance(node.op, PoolRows),
                operators=_all_of(draft, node),
                summed=isinstance(node.op, PoolRows) and of_all_heads(draft, node),
            )
        case Attend() if is_coarse(draft, node):
            if not _left_by_copies(draft, draft.graph[node.inputs[2]]):
                attend(draft, node, node.op)
        case _:
            return False
    return True


def order(draft: Draft, node: Node, *, whole: bool = False) -> None:
    """Where the tokens of every tile are, which all other launches read; `whole`: and where the tiles are."""
    tiling = _tiling(draft)
    rooms = RoomsContext(name="rooms_of_tiles", tiling=tiling, whole=whole)
    values = Config(constexprs=(("BLOCK_N", 256),), num_warps=4, num_stages=1)
    draft.kernel("index", rooms, values, *_all_of(draft, node))
    context = OrderContext(name="order_tiles", tiling=tiling)
    padded = next_power(tiling.slots)
    alone = Config(constexprs=(), num_warps=max(1, min(4, padded // 64)), num_stages=1)
    draft.kernel("index", context, alone, *_all_of(draft, node))
    slots, sequences = tiling.slots, "batch.sequences"

    def made(name: str, *dims: str) -> Buffer:
        return Buffer(name=f"made_{name}", dtype="i32", dims=dims, role="list")

    draft.steps.append(
        Step(
            title="order: tiles",
            needs=node.inputs,
            makes=(node.name,),
            sizes=(
                *tiling.rooms("longest", "batch.keys", "1"),
                *tiling.rooms("packed", "in_k.shape[1]", sequences),
                *tiling.rooms("first", "batch.rows", sequences),
                # rows that begin in the middle of a slab have one more
                ("whole_tiles", f"max(1, first_slabs + {sequences}) * {tiling.across}"),
                ("row_tiles", "first_tiles if batch.from_start else whole_tiles"),
                ("key_tiles", f"packed_tiles if batch.packed else {sequences} * longest_tiles"),
                ("all_tiles", "row_tiles + key_tiles"),
                ("keys_slots", f"longest_tiles * {slots}"),
                ("key_slots", f"key_tiles * {slots}"),
                ("row_slots", f"row_tiles * {slots}"),
            ),
            buffers=(
                made("order", "row_slots"),
                made("key_order", "key_slots"),
                made("tokens", "key_tiles"),
                made("slots", sequences, "6"),
                *((made("tiles", sequences, "6"),) if whole else ()),
            ),
            launches=(
                Launch(
                    kernel=rooms.name,
                    grid=("1",),
                    arguments=(
                        axes.MADE_SLOTS,
                        *(("made_tiles",) if whole else ()),
                        *text.SEQ,
                    ),
                ),
                Launch(
                    kernel=context.name,
                    grid=("all_tiles",),
                    arguments=(
                        *("made_order", "made_key_order", "made_tokens", axes.MADE_SLOTS),
                        *text.SEQ,
                        "row_tiles",
                    ),
                ),
            ),
        )
    )
    gated = isinstance(draft.graph[draft.graph.outputs.o].op, OutputGate)  # which walks tokens
    laid = f"batch.laid({axes.MADE_SLOTS}, row_slots, keys_slots)"
    draft.steps.append(
        Step(
            title=SLOTS,
            needs=(node.name,),
            makes=(_slots_of(node.name),),
            sizes=(*(((TOKENS, "batch"),) if gated else ()), ("batch", laid)),
            buffers=(),
            launches=(),
        )
    )


def source_of(draft: Draft, name: str) -> str:
    """What is copied into slots, where a node is a copy."""
    node = draft.graph[name]
    return node.inputs[0] if isinstance(node.op, Permute) else name


def _left_by_copies(draft: Draft, pool: Node) -> bool:
    """Whether means are left by the copies of a turn's heads: of values, which no choice waits for."""
    users = draft.graph.users(pool.name)
    copied = any(isinstance(x.op, Permute) for x in draft.graph.users(pool.inputs[0]))
    return copied and all(is_coarse(draft, x) and x.inputs[1] != pool.name for x in users)


def attend_means(draft: Draft, means: tuple[str, ...]) -> None:
    """Branches over means that are there now."""
    for node in draft.graph.nodes():
        if isinstance(node.op, Attend) and is_coarse(draft, node) and node.inputs[2] in means:
            attend(draft, node, node.op)


def turns(draft: Draft, node: Node) -> together.Turns | None:
    """How heads of a branch over tiles have turns, and what copies the keys of a turn's into slots."""
    if draft.tiling is None:
        return None
    assert isinstance(node.op, Attend)
    name, heads = node.op.branch, draft.shape.kv_heads
    turn = f"turn_{name}"
    copies: list[tuple[tuple[Buffer, ...], Launch]] = []
    sizes: list[tuple[str, str]] = []
    left: list[str] = []
    for x in node.inputs[1:3]:
        users = draft.graph.users(source_of(draft, x))
        pools = [y for y in users if isinstance(y.op, Pool) and _left_by_copies(draft, y)]
        (pooled,) = [y.name for y in pools] or ("",)
        if pooled:
            sizes.append((f"count_{text.safe(pooled)}", "0"))  # those of all sequences lie in one
            left.append(pooled)
        copies.append(
            copied(
                draft,
                source_of(draft, x),
                into=text.buffer(x),
                pooled=pooled,
                turn=turn,
                of_rows=False,
                operators=(node.name, *(name for y in pools for name in _all_of(draft, y))),
            )
        )
    held = 2 * (draft.shape.qk + draft.shape.v)  # bytes of a slot of a head, as if of 16 bits
    return together.Turns(
        heads=heads,
        sizes=(*sizes, *of_heads(draft, name, f"key_slots * {held}", KEYS_SHARE)),
        turn=turn,
        buffers=tuple(buffer for buffers, _ in copies for buffer in buffers),
        launches=tuple(launch for _, launch in copies),
        makes=tuple(left),
    )


def of_heads(draft: Draft, name: str, held: str, share: Fraction) -> tuple[tuple[str, str], ...]:
    """The sizes that say how many heads of keys have a turn, about as many in each: `turn_NAME`.

    What is held of a turn's heads, `held` bytes of each, is a share of what a call is given, but there are
    no more than MOST_TURNS turns for that.
    """
    heads = draft.shape.kv_heads
    room, bytes_ = f"room_{name}", f"bytes_{name}"
    fit, number = f"fit_{name}", f"turns_{name}"
    least = -(-heads // MOST_TURNS)
    return (
        (room, f"in_q.shape[0] * in_q.shape[1] * {int(_given(draft) * share)}"),
        (bytes_, held),
        (fit, f"max({least}, min({heads}, {room} // max(1, {bytes_})))"),
        (number, f"({heads} + {fit} - 1) // {fit}"),
        (f"turn_{name}", f"({heads} + {number} - 1) // {number}"),
    )


def _given(draft: Draft) -> int:
    """Bytes of a token of what a call is given, as if of 16 bits."""
    inputs = (node for node in draft.graph.nodes() if isinstance(node.op, Input))
    tokens = (x.type.dims for x in inputs if x.type.dims[:1] == ("B",))
    return 2 * sum(math.prod(map(draft.size, dims[2:])) for dims in tokens)


def copied(
    draft: Draft,
    source: str,
    *,
    into: str,
    turn: str,
    of_rows: bool,
    operators: tuple[str, ...],
    pooled: str = "",
) -> tuple[tuple[Buffer, ...], Launch]:
    """A turn's heads of a tensor in slots: where they are, and what copies them.

    turn: how many heads of keys have one at most.  pooled: a node of means that are left on the way.
    """
    tiling = _tiling(draft)
    heads, dim = (draft.size(name) for name in draft.graph[source].type.dims[2:])
    context = CopyContext(
        name=f"slots_of_{text.safe(source)}",
        tiling=tiling,
        heads=heads,
        head_dim=dim,
        copies=True,
        pools=bool(pooled),
        rows=of_rows,
    )
    draft.kernel("segments", context, of_tile(tiling, dim), *operators)
    each = heads // draft.shape.kv_heads
    of = "{}" if each == 1 else f"{{}} * {each}"
    dims = ("1", "row_slots" if of_rows else "key_slots", of.format(turn), str(dim))
    made = [Buffer(name=into, dtype="input", dims=dims, role="list")]
    if pooled:
        shape = ("1", "key_tiles", str(heads), str(dim))
        made.append(Buffer(name=text.buffer(pooled), dtype="input", dims=shape, role="level"))
    return tuple(made), Launch(
        kernel=context.name,
        grid=(programs(of_rows=of_rows), of.format("count")),
        arguments=(
            *text.strides(text.input_of(source)),
            *(into, f"{into}.stride(1)"),
            *(buffer.name for buffer in made[1:]),
            "made_order" if of_rows else "made_key_order",
            *text.SEQ,
            of.format("tile_first"),
        ),
    )


def means(
    draft: Draft,
    source: str,
    pooled: str,
    *,
    of_rows: bool,
    operators: tuple[str, ...],
    wide: bool = False,
    summed: bool = False,
) -> None:
    """One launch that leaves the means of tiles, of a node `pooled`.

    summed: means of the heads that share a key head are added.
    """
    tiling = _tiling(draft)
    heads, dim = (draft.size(name) for name in draft.graph[source].type.dims[2:])
    group = draft.shape.group if summed else 1
    heads //= group
    context = CopyContext(
        name=f"tiles_of_{text.safe(source)}",
        tiling=tiling,
        heads=heads,
        head_dim=dim,
        pools=True,
        rows=of_rows,
        wide=wide,
        group=group,
    )
    draft.kernel("segments", context, of_means(tiling, dim), *operators)
    shape = (str(heads), str(dim))
    number = f"{'blocks' if of_rows else 'count'}_{text.safe(pooled)}"
    tiles = together.blocks_of(tiling.slots) if of_rows else "key_tiles"
    made = Buffer(
        name=text.buffer(pooled),
        dtype="f32" if of_rows or wide else "input",
        dims=(number, *shape) if of_rows else ("1", tiles, *shape),
        role="level",
    )
    draft.steps.append(
        Step(
            title=f"tiles: {pooled}",
            needs=(source,),
            makes=(pooled,),
            sizes=((number, tiles if of_rows else "0"),),  # tiles of all sequences lie in one
            buffers=(made,),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(programs(of_rows=of_rows), str(heads)),
                    arguments=(
                        *text.strides(text.input_of(source)),
                        made.name,
                        "made_order" if of_rows else "made_key_order",
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )


def of_all_heads(draft: Draft, queries: Node) -> bool:
    """Whether tiles choose by what all heads score between them, which is a dot of vectors of all heads."""
    scores = [x for x in draft.graph.users(queries.name) if isinstance(x.op, Score)]
    reduced = [y.op for x in scores for y in draft.graph.users(x.name) if isinstance(y.op, Reduce)]
    return any(op.share == "all" and op.how in ("sum", "mean") for op in reduced)


def of_tile(tiling: axes.Tiling, dim: int) -> Config:
    """A program that has a tile of one head."""
    warps = max(1, min(8, next_power(tiling.slots) * next_power(dim) // 2048))
    return Config(constexprs=(), num_warps=warps, num_stages=1)


def of_means(tiling: axes.Tiling, dim: int) -> Config:
    """The same where only a mean is left: what several warps had would be added up by way of memory."""
    warps = max(1, of_tile(tiling, dim).num_warps // 4)
    return Config(constexprs=(), num_warps=warps, num_stages=1)


def programs(*, of_rows: bool) -> str:
    """One a tile."""
    return "row_tiles" if of_rows else "key_tiles"


def is_coarse(draft: Draft, node: Node) -> bool:
    """Whether a branch has one output a tile of rows."""
    return draft.tiling is not None and isinstance(draft.graph[node.inputs[0]].op, PoolRows)


def attend(draft: Draft, node: Node, op: Attend) -> None:
    """One softmax of a tile's query over all tiles, in float32."""
    tiling = _tiling(draft)
    context = coarse(draft, node, op)
    config = draft.row_tiles_of_blocks.attend(context, limit=64)
    draft.kernel("rows", context, config, node.name, *draft.lse_of(node))
    heads, dim = draft.shape.query_heads, draft.shape.v
    tiles, (o, lse) = f"tiles_of_{op.branch}", tile_buffers(draft, node)
    draft.steps.append(
        Step(
            title=f"attend: {op.branch}",
            needs=node.inputs,
            makes=(node.name, f"{draft.lse_of(node)[0]}.tiles"),
            sizes=((tiles, together.blocks_of(tiling.slots)),),
            buffers=(
                Buffer(name=o, dtype="f32", dims=(tiles, str(heads), str(dim)), role="output"),
                Buffer(name=lse, dtype="f32", dims=(str(heads), tiles), role="output"),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(f"{tiles} // {{BLOCK_T}} + batch.sequences", str(draft.shape.kv_heads)),
                    arguments=(
                        *draft.tensor(node.inputs[0]),
                        *draft.tensor(node.inputs[1]),
                        *draft.tensor(node.inputs[2]),
                        *(o, "0", str(heads * dim), str(dim)),
                        *(lse, "0", tiles, "1"),
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )


def coarse(draft: Draft, node: Node, op: Attend) -> rows.RowsContext:
    """The loops of a branch of tiles."""
    tiling = _tiling(draft)
    context = rows.attend_pooled(
        draft.shape,
        name=f"attend_{op.branch}",
        scale=op.scale if op.scale is not None else 1.0,
        entries=draft.pooled_entries(node.inputs[1]),
        values=True,
    )
    shaped = {"Q": "f32[tiles, Hq, Dqk]", "O": "f32[tiles, Hq, Dv]", "LSE": "f32[Hq, tiles]"}
    params = tuple(
        replace(p, dtype="f32", comment=shaped[p.name]) if p.name in shaped else p
        for p in context.params
    )
    return replace(context, params=params, together="blocks", rows_together=tiling.slots)


def tile_buffers(draft: Draft, node: Node) -> tuple[str, str]:
    """What a branch of tiles puts out, and its log-sum-exp."""
    return text.buffer(node.name), text.buffer(f"{draft.lse_of(node)[0]}.tiles")


def over_slots(draft: Draft, step: Step, coarse: Sequence[Node]) -> Step:
    """The step that weighs branches, slot by slot: it gives rows what a tile's branch has."""
    (launch,) = step.launches
    spread: list[str] = []
    buffers, makes = list(step.buffers), list(step.makes)
    dims = ("in_q.shape[0]", str(draft.shape.query_heads), "in_q.shape[1]")
    for node in coarse:
        (lse,) = draft.lse_of(node)
        _, own = tile_buffers(draft, node)
        assert isinstance(node.op, Attend)
        spread += [own, f"tiles_of_{node.op.branch}", *text.strides(text.buffer(lse))]
        buffers.append(Buffer(name=text.buffer(lse), dtype="f32", dims=dims, role="output"))
        makes.append(lse)
    read = len(launch.arguments) - len(text.SEQ)
    arguments = (*launch.arguments[:read], *spread, axes.MADE_ORDER, *launch.arguments[read:])
    lses = [f"{lse}.tiles" for node in coarse for lse in draft.lse_of(node)]
    return replace(
        step,
        needs=(*step.needs, *lses, _slots_of(order_of(draft))),
        makes=tuple(makes),
        buffers=tuple(buffers),
        launches=(replace(launch, arguments=arguments),),
    )


def in_slots(draft: Draft) -> None:
    """Steps so far, but the one that lays tokens out, walk slots."""
    if draft.tiling is None:
        return
    order = order_of(draft)
    for i, step in enumerate(draft.steps):
        if order not in step.makes and step.title != SLOTS:
            draft.steps[i] = _behind(step, _slots_of(order))


def of_tokens(draft: Draft) -> None:
    """The last step walks tokens again."""
    if draft.tiling is not None:
        step = _behind(draft.steps[-1], _slots_of(order_of(draft)))
        draft.steps[-1] = replace(step, sizes=(("batch", TOKENS), *step.sizes))


def _behind(step: Step, name: str) -> Step:
    """The same step, which needs something else too."""
    return replace(step, needs=tuple(dict.fromkeys((*step.needs, name))))


def _slots_of(order: str) -> str:
    return f"{order}.slots"


def _all_of(draft: Draft, node: Node) -> tuple[str, ...]:
    """The nodes of the graph as it came that one does."""
    return (node.name, *(name for name, one in draft.merged.items() if one == node.name))


def order_of(draft: Draft) -> str:
    """The node that says where tokens are."""
    return next(node.name for node in draft.graph.nodes() if isinstance(node.op, Cluster))


def _tiling(draft: Draft) -> axes.Tiling:
    assert draft.tiling is not None, "asked of tiles"
    return draft.tiling
