"""Launches of runs of tokens: where they begin and their keys, and tokens that are kept by their scores."""

from __future__ import annotations

from hsgen import runs, together
from hsgen.graph import Node, Pool, Score, Select
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import next_power
from hsgen.runs import RankRunsContext, RunsContext, Way
from hsgen.schedule import choosing, text
from hsgen.schedule.draft import Draft


def _names(way: Way) -> tuple[str, str, str]:
    """The buffers of starts, of how many runs there are, and the size that says how they lie."""
    level = way.cut.level
    return f"starts_{level}", f"number_{level}", f"first_{level}"


def _of_token(way: Way) -> tuple[str, str]:
    """The run of each token, and its stride."""
    run = text.buffer(way.runs.name)
    return run, f"0 if batch.packed else {run}.stride(0)"


def launched(draft: Draft, node: Node) -> bool:
    """Launch what cuts keys into runs, at the node that says where they begin; whether a node is of these."""
    way = runs.way_to(draft.graph, node.name)
    if way is None or node.name not in way.names:
        return False
    if node.name == way.runs.name:
        _cut(draft, way)
    return True


def _cut(draft: Draft, way: Way) -> None:
    """Compare what is before and after each token, say where runs begin, and make a key of each."""
    source, pooled = draft.graph[way.runs.inputs[0]], draft.graph[way.keys.inputs[0]]
    assert isinstance(way.keys.op, Pool)
    level, span = way.cut.level, way.span

    def context(name: str, how: runs.How, of: Node) -> RunsContext:
        heads, dim = (draft.size(x) for x in of.type.dims[2:])
        return RunsContext(
            name=f"{name}_{level}",
            how=how,
            heads=heads,
            head_dim=dim,
            span=span,
            threshold=way.cut.threshold or 0.0,
            pool=way.keys.op.how if isinstance(way.keys.op, Pool) else "",
        )

    sides = context("compare", "sides", source)
    begin = context("cut", "begin", source)
    pool = context("pool", "run", pooled)
    draft.kernel(
        "segments",
        sides,
        _config(max(1, min(64, 4096 // next_power(sides.head_dim)))),
        way.runs.name,
    )
    draft.kernel("segments", begin, _config(1024, warps=8), way.runs.name)
    draft.kernel("segments", pool, _config(32), way.keys.name)
    starts, number, first = _names(way)
    alike, run, made = f"alike_{level}", text.buffer(way.runs.name), text.buffer(way.keys.name)
    x, tokens, total = text.input_of(source.name), f"tokens_{level}", f"runs_{level}"
    run_b = f"0 if batch.packed else {run}.stride(0)"
    where = (f"{x}.shape[0]", f"{x}.shape[1]")
    draft.steps.append(
        Step(
            title=f"runs: {level}",
            needs=tuple(dict.fromkeys((source.name, pooled.name))),
            makes=(way.runs.name, way.keys.name),
            sizes=(
                (tokens, "max(1, batch.keys)"),
                (first, f"2 if batch.packed else {x}.shape[1] // {span} + 2"),
                (total, f"{x}.shape[0] * ({x}.shape[1] // {span}) + 2 * batch.sequences"),
            ),
            buffers=(
                Buffer(name=alike, dtype="f32", dims=where, role="scratch"),
                Buffer(name=run, dtype="i32", dims=where, role="level"),
                Buffer(name=starts, dtype="i32", dims=(total,), role="level"),
                Buffer(name=number, dtype="i32", dims=("batch.sequences",), role="level"),
                Buffer(
                    name=made,
                    dtype="input",
                    dims=("1", total, str(pool.heads), str(pool.head_dim)),
                    role="level",
                ),
            ),
            launches=(
                Launch(
                    kernel=sides.name,
                    grid=(f"{tokens} // {{BLOCK_N}} + 1", "batch.sequences"),
                    arguments=(*draft.tensor(source.name), alike, run_b, *text.SEQ),
                ),
                Launch(
                    kernel=begin.name,
                    grid=("batch.sequences",),
                    arguments=(alike, run, run_b, starts, number, first, *text.SEQ),
                ),
                Launch(
                    kernel=pool.name,
                    grid=(f"{tokens} // {span} + 2", str(pool.heads), "batch.sequences"),
                    arguments=(
                        *draft.tensor(pooled.name),
                        made,
                        starts,
                        number,
                        first,
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )


def _config(step: int, warps: int = 4) -> Config:
    return Config(constexprs=(("BLOCK_N", step),), num_warps=warps, num_stages=1)


def select(draft: Draft, node: Node, op: Select, way: Way) -> None:
    """Score runs, and keep the best tokens of each block of rows, turn by turn."""
    assert isinstance(way.score.op, Score)
    shape, block, level, span = draft.shape, draft.block(node), op.level, way.span
    scorer = runs.score(
        shape, name=f"score_{level}", block=block, span=span, scale=way.score.op.scale or 1.0
    )
    config = draft.row_tiles_of_blocks.score(scorer)
    draft.attend(scorer, config, way.score.name, way.mapped.name)
    heads, width = shape.query_heads, draft.width(node)
    ranking = RankRunsContext(
        name=f"rank_{level}",
        heads=heads,
        rows=block,
        span=span,
        k=op.k,
        width=width,
        first=op.first,
        last=op.last,
        counted=op.counted,
        causal=shape.causal,
    )
    values = (("BLOCK_R", 1), ("BLOCK_N", 512))
    config = Config(constexprs=values, num_warps=4, num_stages=1)
    draft.kernel("rank", ranking, config, node.name, follows=scorer.name)
    starts, _, first = _names(way)
    run, run_b = _of_token(way)
    blocks, tiles = f"blocks_{level}", f"tiles_{level}"
    capacity, scratch, chunk = f"capacity_{level}", f"scores_{level}", f"chunk_{level}"
    block_t = f'config["{scorer.name}"]["BLOCK_T"]'
    made = text.buffer(choosing.chosen_of(node))
    dims = (f"{chunk} * {block_t}", str(heads), capacity)
    keys = text.buffer(way.keys.name)
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(way.queries.name, way.runs.name, way.keys.name),
            makes=(choosing.chosen_of(node),),
            sizes=(
                (blocks, together.blocks_of(block)),
                (capacity, f"batch.keys // {span} + 2"),
                (tiles, f"{blocks} // {block_t} + batch.sequences"),
                (f"bytes_{level}", f"{4 * heads} * {capacity} * {block_t}"),
                *choosing.chunk_of(draft, level, 0, children=False),
            ),
            buffers=(
                Buffer(name=scratch, dtype="f32", dims=dims, role="scratch"),
                Buffer(name=made, dtype="i32", dims=(blocks, str(heads), str(width)), role="list"),
            ),
            launches=(
                Launch(
                    kernel=scorer.name,
                    grid=("count", str(heads)),
                    arguments=(
                        *draft.tensor(way.queries.name),
                        *(keys, "0", f"{keys}.stride(1)", f"{keys}.stride(2)"),
                        *(run, run_b, first),
                        scratch,
                        capacity,
                        *text.SEQ,
                        "tile_first",
                    ),
                ),
                Launch(
                    kernel=ranking.name,
                    grid=(f"count * ({block_t} // {{BLOCK_R}})", str(heads)),
                    arguments=(
                        scratch,
                        made,
                        *(run, run_b, starts, first),
                        *text.SEQ,
                        "tile_first",
                        capacity,
                    ),
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
    choosing.spread(draft, node, op, heads, block)
