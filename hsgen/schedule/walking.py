"""Launches of a walk down a ranking: scores and the walk itself, and attention to what was taken."""

from __future__ import annotations

from dataclasses import replace

from hsgen import rows, sorting, together, walks
from hsgen.graph import Attend, Node, PoolRows, Score, SelectSet
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import choosing, selected, sorted_keys, text
from hsgen.schedule.draft import Draft
from hsgen.walks import BitsContext, WalkContext

ROOM = 2048  # tokens that are ranked at a time
BLOCKS = 8  # of rows, that are scored at a time


def _order(draft: Draft, node: Node) -> tuple[str, ...]:
    order = sorting.order_of(draft.graph, node)
    assert order is not None, "a walk is one down an order"
    return sorting.arguments(text.buffer(order.name))


def bits(level: str) -> tuple[str, str]:
    """The size that says how many words a row of bits has."""
    return f"bit_words_{level}", "(batch.keys + 31) // 32"


def choose(draft: Draft, node: Node, op: SelectSet) -> None:
    """Score a turn of blocks, and let each walk down its ranking."""
    score, _, keys, before, _ = draft.graph.operands(node)
    assert isinstance(score.op, Score)
    query, shape, block = draft.graph[score.inputs[0]], draft.shape, draft.block(node)
    assert isinstance(query.op, PoolRows)
    level, order, segment = op.level, _order(draft, node), sorted_keys.segment(draft, node)
    scale = score.op.scale or 1.0
    scorer = walks.score(shape, name=f"score_{level}", block=block, segment=segment, scale=scale)
    config = draft.row_tiles_of_blocks.score(scorer)
    few = {"BLOCK_T": BLOCKS, "BLOCK_M": 16}  # whose scores are as long as the keys
    config = replace(config, constexprs=tuple({**dict(config.constexprs), **few}.items()))
    draft.attend(scorer, config, draft.graph[score.inputs[1]].name, score.name)
    walk = WalkContext(
        name=f"walk_{level}",
        heads=shape.query_heads,
        group=shape.group,
        head_dim=shape.qk,
        rows=block,
        segment=segment,
        step=op.step or 1,
        gain=op.value,
        causal=shape.causal,
        scale=shape.qk**-0.5,
        precision=shape.precision,
    )
    room = max(ROOM, rows.next_power(walk.step))
    tile = min(64 if draft.dtype == "fp32" else 128, max(16, walk.padded_rows))
    values = (("BLOCK_M", tile), ("BLOCK_N", 1024), ("BLOCK_P", room))
    config = Config(constexprs=values, num_warps=8, num_stages=1)
    draft.kernel("sorting", walk, config, node.name, follows=scorer.name)
    blocks, tiles, chunk = (f"{of}_{level}" for of in ("blocks", "tiles", "chunk"))
    capacity, scratch = f"capacity_{level}", f"scores_{level}"
    block_t = f'config["{scorer.name}"]["BLOCK_T"]'
    heads = str(shape.query_heads)
    made = text.buffer(choosing.chosen_of(node))
    held = (f"{chunk} * {block_t}", heads)
    summed = draft.graph[before.inputs[0]]
    room_of = f'config["{walk.name}"]["BLOCK_P"]'
    part = choosing.part_of(draft.graph, node)
    assert part is not None, "a walk has room for all"
    words, of_words = bits(level)
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(score.inputs[0], keys.name, before.name, node.inputs[4]),
            makes=(choosing.chosen_of(node),),
            sizes=(
                (blocks, together.blocks_of(block)),
                *part.sizes(level),
                (words, of_words),
                (capacity, "max(1, batch.keys)"),
                (tiles, f"{blocks} // {block_t} + batch.sequences"),
                (f"length_{level}", f"{capacity} + 2 * {room_of} + {2 * walk.padded_rows}"),
                (f"bytes_{level}", f"{4 * shape.query_heads} * length_{level} * {block_t}"),
                (f"most_{level}", f"min(SCRATCH_BYTES, batch.rows * {draft.held // 16})"),
                (chunk, f"min({tiles}, max(1, most_{level} // bytes_{level}))"),
            ),
            buffers=(
                Buffer(name=scratch, dtype="f32", dims=(*held, capacity), role="scratch"),
                Buffer(
                    name=f"ranked_{level}", dtype="i32", dims=(*held, "2", room_of), role="scratch"
                ),
                Buffer(
                    name=f"sums_{level}",
                    dtype="f32",
                    dims=(*held, "2", str(walk.padded_rows)),
                    role="scratch",
                ),
                Buffer(name=made, dtype="i32", dims=(blocks, heads, words), role="list"),
            ),
            launches=(
                Launch(
                    kernel=scorer.name,
                    grid=("count", heads),
                    arguments=(
                        *draft.tensor(score.inputs[0]),
                        *draft.tensor(keys.name),
                        *order,
                        scratch,
                        capacity,
                        *text.SEQ,
                        "tile_first",
                    ),
                ),
                Launch(
                    kernel=walk.name,
                    grid=(f"count * {block_t}", heads),
                    arguments=(
                        *draft.tensor("q"),
                        *draft.tensor(keys.name),
                        scratch,
                        capacity,
                        *text.strides(draft.log_sum_exp(summed)),
                        *order,
                        made,
                        words,
                        f"ranked_{level}",
                        f"sums_{level}",
                        *text.SEQ,
                        "tile_first",
                    ),
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
    _spread(draft, node, made, words)


def _spread(draft: Draft, node: Node, made: str, words: str) -> None:
    """Every row's list of what its block took."""
    assert isinstance(node.op, SelectSet)
    level, heads = node.op.level, draft.shape.query_heads
    context = BitsContext(
        name=f"spread_{level}", how="unfold_rows", heads=heads, rows=draft.block(node)
    )
    values = Config(constexprs=(("BLOCK_N", 256),), num_warps=2, num_stages=1)
    draft.kernel("index", context, values, node.name)
    lists, width = text.buffer(node.name), draft.slots(node)
    dims = ("in_q.shape[0]", "in_q.shape[1]", str(heads), width)
    draft.steps.append(
        Step(
            title=f"lists of rows: {level}",
            needs=(choosing.chosen_of(node),),
            makes=(node.name,),
            of="rows",
            buffers=(Buffer(name=lists, dtype="i32", dims=dims, role="selection"),),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=("batch.rows + batch.sequences", str(heads)),
                    arguments=(made, lists, words, width, *text.SEQ),
                ),
            ),
        )
    )


def attend(draft: Draft, node: Node, op: Attend) -> None:
    """Attention to what blocks took, lists of some at a time; or to what rows chose between them."""
    selection, shape, name = draft.graph[node.inputs[3]], draft.shape, op.branch
    assert isinstance(selection.op, SelectSet)
    block, heads, level = draft.block(selection), draft.shape.query_heads, selection.op.level
    own, segment = walks.own_of(draft.graph, selection), sorted_keys.segment(draft, selection)
    context = walks.attend(
        shape, name=f"attend_{name}", scale=op.scale or 1.0, block=block, own=own
    )
    context = selected.as_branch(draft, context, node, op)
    config = draft.row_tiles.attend(context, limit=128, most=block)
    unfold = BitsContext(name=f"index_{name}", how="unfold", heads=heads, rows=block)
    members = together.ListsContext(
        name=f"members_{name}",
        how="members",
        heads=heads,
        rows=block,
        size=1,
        stride=1,
        causal=shape.causal,
        segment=segment,
        apart=True,
    )
    few = Config(constexprs=(("BLOCK_N", 512),), num_warps=4, num_stages=1)
    draft.kernel("index", unfold, few, node.name, follows=context.name)
    step = max(16, 4096 // config["BLOCK_T"])
    values = (("BLOCK_K", step), ("BLOCK_N", 512))
    many = Config(constexprs=values, num_warps=4, num_stages=1)
    draft.kernel("index", members, many, node.name, follows=context.name)
    draft.attend(context, config, *draft.makes(node))
    made = text.buffer(choosing.chosen_of(selection))
    tiles, capacity, chunk = (f"{of}_{name}" for of in ("tiles", "capacity", "chunk"))
    parts, tokens, blocks, given = (f"{of}_{name}" for of in ("parts", "tokens", "turn", "given"))
    counts, entries = (f"{of}_{name}" for of in ("counts", "entries"))
    order = _order(draft, node)
    bit_words, of_words = bits(level)
    common = (
        (tokens, f'config["{context.name}"]["BLOCK_T"]'),
        (parts, f"({block} + {tokens} - 1) // {tokens}"),
        (tiles, f"(batch.rows // {block} + 3 * batch.sequences) * {parts}"),
        (capacity, "max(1, batch.keys)"),
    )

    def attends(lists: tuple[str, ...], number: str) -> Launch:
        return Launch(
            kernel=context.name,
            grid=("count", str(heads)),
            arguments=(
                *draft.tensors(node, op),
                *lists,
                capacity,
                number,
                *draft.outputs(node),
                *order,
                *text.SEQ,
                "tile_first",
            ),
        )

    def held(name: str, *dims: str) -> Buffer:
        return Buffer(name=name, dtype="i32", dims=dims, role="list")

    draft.steps.append(
        Step(
            title=f"attend: {name}",
            needs=draft.needs(node, *node.inputs[:3], *node.inputs[4:], f"{selection.name}.blocks"),
            makes=draft.makes(node),
            of="own",
            sizes=(
                *common,
                (bit_words, of_words),
                (f"bytes_{name}", f"{4 * heads} * {capacity}"),
                (f"most_{name}", f"max(SCRATCH_BYTES // 16, batch.rows * {draft.held // 16})"),
                (blocks, f"max(1, most_{name} // bytes_{name})"),
                (chunk, f"min({tiles}, {blocks} * {parts})"),
            ),
            buffers=(
                held(counts, chunk, str(heads), "2"),
                held(entries, f"{chunk} // {parts}", str(heads), capacity),
                *draft.output_buffers(node),
            ),
            launches=(
                Launch(
                    kernel=unfold.name,
                    grid=(f"count // {parts}", str(heads)),
                    arguments=(
                        made,
                        counts,
                        entries,
                        bit_words,
                        capacity,
                        *text.SEQ,
                        "tile_first",
                    ),
                ),
                attends((counts, entries, entries), "0"),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
    lists = text.buffer(selection.name)
    num_words = f"num_words_{name}"
    brought = (f"{given}_counts", f"{given}_entries", f"{given}_words")
    draft.steps.append(
        Step(
            title=f"attend: {name}, over a selection of the caller's",
            needs=draft.needs(node, *node.inputs[:3], *node.inputs[4:], selection.name),
            makes=draft.makes(node),
            of="given",
            sizes=(
                *common,
                (num_words, f"({tokens} + 31) // 32"),
                (f"bytes_{name}", f"{4 * heads} * {capacity} * ({num_words} + 1)"),
                (chunk, f"min({tiles}, max(1, SCRATCH_BYTES // bytes_{name}))"),
            ),
            buffers=(
                held(brought[0], chunk, str(heads), "2"),
                held(brought[1], chunk, str(heads), capacity),
                held(brought[2], chunk, str(heads), capacity, num_words),
                *draft.output_buffers(node),
            ),
            launches=(
                Launch(
                    kernel=members.name,
                    grid=("count", str(heads)),
                    arguments=(
                        *together.given_of(lists),
                        *brought,
                        f"{lists}.shape[3]",
                        capacity,
                        *text.SEQ,
                        "tile_first",
                    ),
                ),
                attends(brought, num_words),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
