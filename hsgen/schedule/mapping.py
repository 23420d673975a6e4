"""Launches of a choice by what small blocks of rows give small entries, put together to blocks of both."""

from __future__ import annotations

from dataclasses import replace

from hsgen import configs, together
from hsgen.graph import Map, Node, Pool, PoolRows, ReduceRows, Score, Select, SelectSet
from hsgen.maps import MapsContext, Way
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import choosing, text
from hsgen.schedule.draft import Draft


def select(draft: Draft, node: Node, op: Select | SelectSet, way: Way) -> None:
    """Tiles of products, sums over what is left of them, and the best of each block of rows, turn by turn."""
    products, sums = _contexts(draft, way)
    config = configs.maps(products, draft.target, draft.dtype)
    draft.kernel("maps", products, config, *way.tiles)
    draft.kernel("maps", sums, configs.sums(sums), way.together.name, follows=products.name)
    ranking = choosing.ranking(draft, node, op, short=True)
    by_count = configs.rank(0, op.stride, config["BLOCK_T"], grouped=False)
    ranks = configs.rank_by_mass(op.stride) if ranking.edged else by_count
    draft.kernel("rank", ranking, ranks, node.name, follows=products.name)
    level, block, heads = op.level, draft.block(node), str(products.heads)
    part = choosing.part_of(draft.graph, node)
    slots = choosing.slots_of(draft, node)
    capacity, parts, scratch = f"capacity_{level}", f"parts_{level}", f"scores_{level}"
    blocks, tiles, chunk = f"blocks_{level}", f"tiles_{level}", f"chunk_{level}"
    block_t = f'config["{products.name}"]["BLOCK_T"]'
    per_row = products.per_row
    row = 4 * products.heads * (per_row + 1)
    made = choosing.chosen_of(node)
    lists = text.buffer(made)
    seq = (*text.SEQ, "tile_first")
    held = (f"{chunk} * {block_t}", heads)
    entries = f"{capacity} * {products.per_entry} // {{BLOCK_N}} + 1"
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(way.queries.inputs[0], way.keys.inputs[0]),
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
                    dims=(*held, str(per_row), capacity),
                    role="scratch",
                ),
                Buffer(name=scratch, dtype="f32", dims=(*held, capacity), role="scratch"),
                Buffer(name=lists, dtype="i32", dims=(blocks, heads, slots), role="list"),
            ),
            launches=(
                Launch(
                    kernel=products.name,
                    grid=("count", entries, heads),
                    arguments=(
                        *draft.tensor(way.queries.inputs[0]),
                        *draft.tensor(way.keys.inputs[0]),
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
                    grid=(f"count * ({block_t} // {{BLOCK_R}})", heads),
                    arguments=(scratch, lists, *seq, capacity, *((slots,) if part else ())),
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
    choosing.spread(draft, node, op, products.heads, block)


def _contexts(draft: Draft, way: Way) -> tuple[MapsContext, MapsContext]:
    """The numbers of both launches that make scores."""
    queries, keys, score = way.queries.op, way.keys.op, way.score.op
    mapped, reduced = way.mapped.op, way.together.op
    assert isinstance(queries, PoolRows)
    assert isinstance(keys, Pool)
    assert isinstance(score, Score)
    assert isinstance(mapped, Map)
    assert isinstance(reduced, ReduceRows)
    assert queries.block is not None, "refused"
    assert reduced.block is not None, "refused"
    products = MapsContext(
        name=f"score_{reduced.level}",
        how="tiles",
        heads=draft.shape.query_heads,
        group=draft.shape.group,
        dim=draft.shape.qk,
        slots=keys.size if keys.how == "antidiagonal" else 1,
        part=queries.block,
        entry=keys.size,
        rows=reduced.block,
        size=mapped.size,
        causal=draft.shape.causal,
        greatest=mapped.how == "max",
        scale=score.scale or 1.0,
        precision=draft.shape.precision,
    )
    return products, replace(products, name=f"sum_{reduced.level}", how="sums")
