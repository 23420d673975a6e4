"""Launches of a choice by what small blocks of rows give small entries, put together to blocks of both."""

from __future__ import annotations

from dataclasses import replace

from hsgen import configs, together
from hsgen.graph import Input, Map, Node, Pool, PoolRows, ReduceRows, Score, Select, SelectSet
from hsgen.kernels import ApartContext, RankContext
from hsgen.maps import MapsContext, Way
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import choosing, text
from hsgen.schedule.draft import Draft


def select(draft: Draft, node: Node, op: Select | SelectSet, way: Way) -> None:
    """Tiles of products, sums over what is left of them, and the best of each block of rows, turn by turn."""
    products, sums = _contexts(draft, way)
    if way.last:
        _select_last(draft, node, op, way, products, sums)
        return
    config = configs.maps(products, draft.target, draft.dtype)
    draft.kernel("maps", products, config, *way.tiles)
    draft.kernel("maps", sums, configs.sums(sums), way.together.name, follows=products.name)
    budget = _budget_of(draft, node, op)
    ranking, ranks, split = _ranking(draft, node, op, products.heads, config["BLOCK_T"])
    draft.kernel("rank", ranking, ranks, node.name, follows=products.name)
    level, block, heads = op.level, draft.block(node), str(products.heads)
    part = choosing.part_of(draft.graph, node)
    slots = choosing.slots_of(draft, node)
    capacity, parts, scratch = f"capacity_{level}", f"parts_{level}", f"scores_{level}"
    blocks, tiles, chunk = f"blocks_{level}", f"tiles_{level}", f"chunk_{level}"
    block_t = f'config["{products.name}"]["BLOCK_T"]'
    per_row = products.per_row
    planes = 1 + products.by_sum
    row = 4 * products.heads * (planes * per_row + 1)
    made = choosing.chosen_of(node)
    lists = text.buffer(made)
    seq = (*text.SEQ, "tile_first")
    held = (f"{chunk} * {block_t}", heads)
    entries = f"{capacity} * {products.per_entry} // {{BLOCK_N}} + 1"
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(_asked(way), _read(way), *budget[:1], *_split(node, op)),
            makes=(made,),
            sizes=(
                (blocks, together.blocks_of(block)),
                *(part.sizes(level) if part else ()),
                (capacity, f"batch.keys // {op.stride} + 1"),
                (tiles, f"{blocks} // {block_t} + batch.sequences"),
                (f"bytes_{level}", f"{row} * {capacity} * {block_t}"),
                *choosing.chunk_of(draft, level, 0, children=False, part=8),
            ),
            buffers=(
                Buffer(
                    name=parts,
                    dtype="f32",
                    dims=(*held, str(per_row), *("2",) * products.by_sum, capacity),
                    role="scratch",
                ),
                Buffer(name=scratch, dtype="f32", dims=(*held, capacity), role="scratch"),
                Buffer(
                    name=lists, dtype="i32", dims=(blocks, str(ranking.heads), slots), role="list"
                ),
            ),
            launches=(
                Launch(
                    kernel=products.name,
                    grid=("count", entries, heads),
                    arguments=(
                        *draft.tensor(_asked(way)),
                        *draft.tensor(_read(way)),
                        parts,
                        capacity,
                        *seq,
                    ),
                ),
                Launch(
                    kernel=sums.name,
                    grid=(f"count * {block_t}", heads),
                    arguments=(parts, scratch, capacity, *seq),
                ),
                Launch(
                    kernel=ranking.name,
                    grid=(f"count * ({block_t} // {{BLOCK_R}})", str(ranking.heads)),
                    arguments=(
                        scratch,
                        lists,
                        *(_counts(name) for name in budget[1:]),
                        *split,
                        *seq,
                        capacity,
                        *((slots,) if part else ()),
                    ),
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
    choosing.spread(draft, node, op, ranking.heads, block)


def _asked(way: Way) -> str:
    """The queries, as a caller has them."""
    if isinstance(way.queries.op, Input):
        return way.queries.name
    return (way.asking or way.queries).inputs[0]


def _read(way: Way) -> str:
    """The keys, as a caller has them."""
    return way.keys.name if isinstance(way.keys.op, Input) else way.keys.inputs[0]


def _split(node: Node, op: Select | SelectSet) -> tuple[str, ...]:
    """What says where entries part that are kept apart."""
    return node.inputs[-1:] if isinstance(op, SelectSet) and op.apart else ()


def _ranking(
    draft: Draft, node: Node, op: Select | SelectSet, heads: int, tokens: int
) -> tuple[RankContext | ApartContext, Config, tuple[str, ...]]:
    """What keeps the best, and its tensor that says where entries part."""
    ranking = choosing.ranking(draft, node, op, short=True)
    ranking = replace(ranking, sharing=ranking.heads // heads)
    if split := _split(node, op):
        apart = ApartContext(
            name=ranking.name,
            heads=ranking.heads,
            rows=ranking.rows,
            size=op.size,
            stride=op.stride,
            causal=ranking.causal,
            part=ranking.part,
        )
        return apart, configs.threshold(op.stride), tuple(text.input_of(name) for name in split)
    by_count = configs.rank(0, op.stride, tokens, grouped=False)
    return ranking, configs.rank_by_mass(op.stride) if ranking.edged else by_count, ()


def _budget_of(draft: Draft, node: Node, op: Select | SelectSet) -> tuple[str, ...]:
    """What says which part of the entries is kept, and of which level; nothing where the rule itself does."""
    if not isinstance(op, SelectSet) or op.budget_from is None:
        return ()
    source = draft.graph[node.inputs[1]]
    return choosing.chosen_of(source), op.budget_from


def _counts(level: str) -> str:
    return f"counts_{level}"


def _select_last(
    draft: Draft,
    node: Node,
    op: Select | SelectSet,
    way: Way,
    products: MapsContext,
    sums: MapsContext,
) -> None:
    """Tokens that the last rows of each sequence score, their masses by block, and as many as hold enough."""
    products = replace(products, name=f"score_{op.level}")
    sums = replace(sums, name=f"sum_{op.level}")
    ranking = replace(
        choosing.ranking(draft, node, op, short=True), single=True, rows=1, counted=op.counted
    )
    config = configs.maps(products, draft.target, draft.dtype)
    lse = (way.lse.name,) if way.lse else ()
    made_there = (way.score.name, *lse, way.normalised.name, way.together.name)
    draft.kernel("maps", products, config, *made_there)
    draft.kernel("maps", sums, configs.sums(sums), way.mapped.name, follows=products.name)
    ranks = configs.rank_by_mass(op.stride)
    draft.kernel("rank", ranking, ranks, node.name, follows=products.name)
    level, heads, rows = op.level, str(products.heads), str(products.per_row)
    capacity, parts, scratch = f"capacity_{level}", f"parts_{level}", f"scores_{level}"
    part, slots, made = (
        choosing.part_of(draft.graph, node),
        draft.slots(node),
        choosing.chosen_of(node),
    )
    assert part is not None, "refused"
    seq, each = (*text.SEQ, "0"), ("batch.sequences", heads)
    entries = f"{capacity} * {products.per_entry} // {{BLOCK_N}} + 1"
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(_asked(way), way.keys.name),
            makes=(made,),
            sizes=(*part.sizes(level), (capacity, f"batch.keys // {op.stride} + 1")),
            buffers=(
                Buffer(name=parts, dtype="f32", dims=(*each, rows, capacity), role="scratch"),
                Buffer(name=scratch, dtype="f32", dims=(*each, capacity), role="scratch"),
                Buffer(name=_counts(level), dtype="i32", dims=(*each, "2"), role="list"),
                Buffer(name=text.buffer(made), dtype="i32", dims=(*each, slots), role="list"),
            ),
            launches=(
                Launch(
                    kernel=products.name,
                    grid=("batch.sequences", entries, heads),
                    arguments=(
                        *draft.tensor(_asked(way)),
                        *draft.tensor(way.keys.name),
                        parts,
                        capacity,
                        *seq,
                    ),
                ),
                Launch(kernel=sums.name, grid=each, arguments=(parts, scratch, capacity, *seq)),
                Launch(
                    kernel=ranking.name,
                    grid=each,
                    arguments=(
                        scratch,
                        text.buffer(made),
                        _counts(level),
                        *seq,
                        capacity,
                        slots,
                    ),
                ),
            ),
        )
    )
    choosing.spread(draft, node, op, products.heads, 0)


def _contexts(draft: Draft, way: Way) -> tuple[MapsContext, MapsContext]:
    """The numbers of both launches that make scores."""
    queries, keys, score = way.queries.op, way.keys.op, way.score.op
    mapped, reduced = way.mapped.op, way.together.op
    assert isinstance(score, Score)
    assert isinstance(mapped, Map)
    assert isinstance(reduced, ReduceRows)
    alone = MapsContext(
        name=f"score_{reduced.level}",
        how="tiles",
        heads=draft.shape.query_heads,
        group=draft.shape.group,
        dim=draft.shape.qk,
        slots=1,
        part=1,
        entry=1,
        rows=1,
        size=mapped.size,
        causal=draft.shape.causal,
        greatest=False,
        scale=score.scale or 1.0,
        precision=draft.shape.precision,
        last=way.last,
    )
    if way.last:
        return alone, replace(alone, how="sums")
    if way.of_tokens:
        assert reduced.block is not None, "refused"
        products = replace(alone, rows=reduced.block)
        return products, replace(products, name=f"sum_{reduced.level}", how="sums")
    assert isinstance(queries, PoolRows)
    assert isinstance(keys, Pool)
    assert queries.block is not None, "refused"
    assert reduced.block is not None, "refused"
    by_sum = mapped.how == "max" and way.lse is not None
    products = replace(
        alone,
        slots=keys.size if keys.how == "antidiagonal" else 1,
        part=queries.block,
        entry=keys.size,
        rows=reduced.block,
        greatest=mapped.how == "max" and not by_sum,
        by_sum=by_sum,
    )
    if way.asking:
        agree = draft.shape.group
        products = replace(products, heads=draft.shape.kv_heads, group=1, asking=agree)
    return products, replace(products, name=f"sum_{reduced.level}", how="sums")
