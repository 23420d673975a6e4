"""Launches of a graph whose entries are tiles of axes: where tokens are, keys in slots, and means of tiles.

Steps are written as if slots were all there is, and then told of slots in place of rows and keys: `in_slots`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hsgen import axes, rows, together
from hsgen.axes import CopyContext, OrderContext
from hsgen.errors import PlanError
from hsgen.graph import Attend, Cluster, Node, Permute, Pool, PoolRows, Reduce, Score
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import next_power
from hsgen.schedule import text
from hsgen.schedule.draft import Draft

SLOTTED: Mapping[str, str] = {
    "batch.table": "made_slots",
    "batch.rows": "row_slots",
    "batch.keys": "keys_slots",
}


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
            copy(draft, node)
        case Pool() | PoolRows():
            pool(draft, node, node.op)
        case Attend() if is_coarse(draft, node):
            attend(draft, node, node.op)
        case _:
            return False
    return True


def order(draft: Draft, node: Node, *, whole: bool = False) -> None:
    """Where the tokens of every tile are, which all other launches read; `whole`: and where the tiles are."""
    tiling = _tiling(draft)
    context = OrderContext(name="order_tiles", tiling=tiling, whole=whole)
    padded = next_power(tiling.slots)
    values = Config(constexprs=(("BLOCK_E", max(1, 1024 // padded)),), num_warps=4, num_stages=1)
    draft.kernel("index", context, values, *_all_of(draft, node))
    slab, slots = tiling.slab, tiling.slab_slots
    packed = f"in_k.shape[1] // {slab} + batch.sequences"

    def made(name: str, *dims: str) -> Buffer:
        return Buffer(name=f"made_{name}", dtype="i32", dims=dims, role="list")

    draft.steps.append(
        Step(
            title="order: tiles",
            needs=node.inputs,
            makes=(node.name,),
            sizes=(
                ("key_slabs", f"(batch.keys + {slab - 1}) // {slab}"),
                ("row_slabs", f"in_q.shape[1] // {slab} + 2"),
                ("slabs", f"{packed} if batch.packed else batch.sequences * key_slabs"),
                ("keys_slots", f"key_slabs * {slots}"),
                ("row_slots", f"(batch.rows // {slab} + 2 * batch.sequences) * {slots}"),
                ("key_slots", f"max(1, slabs) * {slots}"),
            ),
            buffers=(
                made("order", "row_slots"),
                made("key_order", "key_slots"),
                made("tokens", f"key_slots // {tiling.slots}"),
                made("slots", "batch.sequences", "6"),
                *((made("tiles", "batch.sequences", "6"),) if whole else ()),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(
                        f"max(row_slabs, key_slabs) * {tiling.across} // {{BLOCK_E}} + 1",
                        "batch.sequences",
                    ),
                    arguments=(
                        "made_order",
                        "made_key_order",
                        "made_tokens",
                        "made_slots",
                        *(("made_tiles",) if whole else ()),
                        *text.SEQ,
                        "1 if batch.packed else key_slabs",
                    ),
                ),
            ),
        )
    )


def copy(draft: Draft, node: Node) -> None:
    """Keys or values in their slots, and their means where these are asked for: one read of them."""
    (pooled,) = _pools_of(draft, node.inputs[0]) or (None,)
    _tiles(draft, node, pooled)


def pool(draft: Draft, node: Node, op: Pool | PoolRows) -> None:
    """Means of tiles of rows, or of keys that nobody copies."""
    if isinstance(op, Pool) and _copies_of(draft, node.inputs[0]):
        return
    _tiles(draft, None, node)


def _tiles(draft: Draft, copied: Node | None, pooled: Node | None) -> None:
    """Tokens of tiles copied into slots, or one mean a tile, or both."""
    (source, *_) = (node.inputs[0] for node in (copied, pooled) if node is not None)
    done = _all_of(draft, pooled) if pooled is not None else (order_of(draft),)
    of_rows = pooled is not None and isinstance(pooled.op, PoolRows)
    tiles(
        draft,
        source,
        copied=text.buffer(copied.name) if copied else "",
        pooled=pooled.name if pooled else "",
        of_rows=of_rows,
        makes=tuple(node.name for node in (copied, pooled) if node is not None),
        operators=done,
        summed=of_rows and pooled is not None and of_all_heads(draft, pooled),
    )


def tiles(
    draft: Draft,
    source: str,
    *,
    copied: str,
    pooled: str,
    of_rows: bool,
    makes: tuple[str, ...],
    operators: tuple[str, ...],
    wide: bool = False,
    summed: bool = False,
) -> None:
    """One launch that reads a tensor tile by tile.

    copied: the buffer of its slots.  pooled: the node of its means.  Both empty where they are not made.
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
        copies=bool(copied),
        pools=bool(pooled),
        rows=of_rows,
        wide=wide,
        group=group,
    )
    draft.kernel("segments", context, of_tile(tiling, dim), *operators)
    shape = (str(heads), str(dim))
    buffers: list[Buffer] = []
    sizes: list[tuple[str, str]] = []
    if copied:
        dims = ("1", "row_slots" if of_rows else "key_slots", *shape)
        buffers.append(Buffer(name=copied, dtype="input", dims=dims, role="level"))
    if pooled:
        number = f"{'blocks' if of_rows else 'count'}_{text.safe(pooled)}"
        means = together.blocks_of(tiling.slots) if of_rows else f"key_slots // {tiling.slots}"
        sizes.append((number, means if of_rows else "0"))  # tiles of all sequences lie in one
        buffers.append(
            Buffer(
                name=text.buffer(pooled),
                dtype="f32" if of_rows or wide else "input",
                dims=(number, *shape) if of_rows else ("1", means, *shape),
                role="level",
            )
        )
    draft.steps.append(
        Step(
            title=f"tiles: {', '.join(makes)}",
            needs=(source,),
            makes=makes,
            sizes=tuple(sizes),
            buffers=tuple(buffers),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(*programs(tiling, heads, of_rows=of_rows),),
                    arguments=(
                        *text.strides(text.input_of(source)),
                        *(buffer.name for buffer in buffers),
                        "made_order" if of_rows else "made_key_order",
                        text.SEQ[0],
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


def programs(tiling: axes.Tiling, heads: int, *, of_rows: bool) -> tuple[str, str, str]:
    """One a tile, head and sequence."""
    slabs = "row_slabs" if of_rows else "key_slabs"
    return f"{slabs} * {tiling.across}", str(heads), "batch.sequences"


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
    return _slotted(
        replace(
            step,
            needs=(*step.needs, *lses),
            makes=tuple(makes),
            buffers=tuple(buffers),
            launches=(replace(launch, arguments=arguments),),
        ),
        order_of(draft),
    )


def in_slots(draft: Draft) -> None:
    """Steps so far, but the one that lays tokens out, walk slots."""
    if draft.tiling is not None:
        order = order_of(draft)
        draft.steps = [x if order in x.makes else _slotted(x, order) for x in draft.steps]


def _slotted(step: Step, order: str) -> Step:
    """The same step of slots in place of rows and keys, which lie in one, whatever a caller packs."""

    def told(said: str) -> str:
        if said == "0 if batch.packed else 1":
            return "0"
        return re.sub(r"batch\.\w+", lambda found: SLOTTED.get(found[0], found[0]), said)

    return replace(
        step,
        needs=tuple(dict.fromkeys((*step.needs, order))),
        sizes=tuple((name, told(value)) for name, value in step.sizes),
        buffers=tuple(replace(x, dims=tuple(map(told, x.dims))) for x in step.buffers),
        launches=tuple(
            replace(
                x,
                grid=tuple(map(told, x.grid)),
                arguments=tuple(map(told, x.arguments)),
                given=tuple((name, told(value)) for name, value in x.given),
            )
            for x in step.launches
        ),
    )


def _all_of(draft: Draft, node: Node) -> tuple[str, ...]:
    """The nodes of the graph as it came that one does."""
    return (node.name, *(name for name, one in draft.merged.items() if one == node.name))


def order_of(draft: Draft) -> str:
    """The node that says where tokens are."""
    return next(node.name for node in draft.graph.nodes() if isinstance(node.op, Cluster))


def _tiling(draft: Draft) -> axes.Tiling:
    assert draft.tiling is not None, "asked of tiles"
    return draft.tiling


def _pools_of(draft: Draft, source: str) -> tuple[Node, ...]:
    return tuple(x for x in draft.graph.users(source) if isinstance(x.op, Pool))


def _copies_of(draft: Draft, source: str) -> tuple[Node, ...]:
    return tuple(x for x in draft.graph.users(source) if isinstance(x.op, Permute))
