"""Launches of branches that attend to a selection: which of rows and blocks stay, what lists they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from hsgen import buckets, estimates, picked, pyramids, rows, sorting, together
from hsgen.errors import PlanError
from hsgen.graph import Attend, Node, Pool, Recall, left_to_window
from hsgen.kernels import (
    IndexContext,
    MarksContext,
)
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import Entries, next_power
from hsgen.schedule import choosing, estimating, laid, sorted_keys, text, vectors
from hsgen.schedule.draft import SORT_LIMIT, SORTED, TILE_OF_HEADS, Draft, Order

LEAST_DOT = 16  # keys of a product
LEAST_STEP = 32  # tokens of blocks of which rows share more than they lose to each other's
MEANS_SHARE = Fraction(2, 9)  # of what a call is given, that a turn's means and lists may have
ROUNDS = 4  # programs a processor, of an index whose rows set bits


def order_of(draft: Draft, node: Node, op: Attend) -> Order:
    """Rows come to long blocks that few of them share; short blocks come to tiles of rows."""
    selection = draft.graph[node.inputs[3]]
    alone = selection.type.dims[1:3] == ("T", "Hq") and not draft.block(selection)
    alone = alone and not op.biased
    if alone and op.size == op.stride and draft.width(selection) <= buckets.MOST_SLOTS:
        usual = "keys" if op.size >= buckets.LEAST_BLOCK and not draft.page else "rows"
        return draft.orders.get(op.branch, usual)
    if draft.orders.get(op.branch) == "keys":
        raise PlanError(
            f"branch {op.branch}: rows come to blocks only where every query head chooses at most "
            f"{buckets.MOST_SLOTS} blocks for itself",
            span=node.span,
        )
    return "rows"


def attend_together(draft: Draft, node: Node, op: Attend) -> None:
    """Blocks that rows chose together: a tile's rows share a list."""
    order_of(draft, node, op)
    _require_disjoint(node, op)
    if op.latent:
        message = f"branch {op.branch}: no kernel attends latents by blocks of rows yet"
        raise PlanError(message, span=node.span)
    if draft.cached is not None:
        message = f"branch {op.branch}: no kernel attends what blocks of rows chose in a cache yet"
        raise PlanError(message, span=node.span)
    branch = branch_of(draft, node, op)

    def tiles(context: rows.RowsContext) -> Config:
        if op.size == 1:
            return draft.row_tiles.of_tokens(context, most=branch.block)
        return draft.tiles(context, limit=128, most=branch.block, block=op.size)

    kernels, steps = together.plan(
        draft.shape,
        branch,
        tiles,
    )
    draft.add(kernels, steps)
    if branch.turns is not None:
        laid.attend_means(draft, branch.turns.makes)


def branch_of(draft: Draft, node: Node, op: Attend) -> together.Branch:
    """A branch over what rows chose together."""
    selection, order = draft.graph[node.inputs[3]], sorting.order_of(draft.graph, node)
    brought = isinstance(selection.op, Recall)
    return together.Branch(
        name=op.branch,
        needs=draft.needs(
            node, *(laid.source_of(draft, name) for name in node.inputs[:3]), *node.inputs[4:]
        ),
        makes=draft.makes(node),
        selection=selection.name,
        lists="" if brought else text.buffer(choosing.chosen_of(selection)),
        buffers=draft.output_buffers(node),
        tensors=draft.tensors(node, op),
        outputs=draft.outputs(node),
        block=draft.block(selection),
        width="" if brought else draft.slots(selection),
        heads=draft.size(selection.type.dims[2]),
        share=selection.type.dims[2],
        entries=Entries(size=op.size, stride=op.stride),
        scale=op.scale or 1.0,
        softcap=op.softcap,
        sink=draft.sink(node) is not None,
        turn=draft.turn(node),
        turns=laid.turns(draft, node),
        order=sorting.arguments(text.buffer(order.name)) if order else (),
        segment=sorted_keys.segment(draft, selection),
        shown=estimates.shown_beside(draft.graph, node),
        bits=estimating.words_of(selection)
        if estimates.way_to(draft.graph, selection.name)
        else "",
    )


def attend_tiers(draft: Draft, node: Node, op: Attend) -> None:
    """Entries that rows chose together, tier by tier: their tokens, or means of some of them."""
    assert op.merges is not None, "tiers are attended by merges"
    selection = draft.graph[node.inputs[3]]
    branch = branch_of(draft, node, op)
    means = tuple(x.name for x in draft.graph.operands(node) if isinstance(x.op, Pool))
    tensors = (*branch.tensors, *(x for name in means for x in draft.tensor(name)))
    needs = tuple(name for name in branch.needs if name not in means)  # which it makes on the way
    branch = replace(branch, tensors=tensors, needs=needs)

    def turns(lists: str) -> together.Turns:
        each = draft.size(selection.type.dims[2]) // draft.shape.kv_heads
        return _turns_of_means(draft, op.branch, made, f"{lists} * {4 * max(1, each)}")

    made = {
        name: vectors.means_of_turn(draft, draft.graph[name], f"turn_{op.branch}") for name in means
    }
    kernels, steps = pyramids.plan(
        draft.shape,
        pyramids.Branch(
            of=branch,
            merges=op.merges,
            counted=bool(op.counted),
            tiers=choosing.chosen_of(selection),
            capacity=choosing.slots_of(draft, selection),
        ),
        lambda context: draft.tiles(context, limit=128, most=branch.block, block=op.size),
        turns,
    )
    draft.add(kernels, steps)


def _turns_of_means(
    draft: Draft, name: str, made: Mapping[str, vectors.Made], lists: str
) -> together.Turns:
    """How heads of a branch in tiers have turns, each of which makes its means; `lists`: a head's bytes."""
    means, held = f"means_{name}", f"lists_{name}"
    sums = [(means, "0")]
    for each, of in made.items():
        sums += [*of.sizes, (means, f"{means} + rows_{text.safe(each)} * {of.bytes}")]
    return together.Turns(
        heads=draft.shape.kv_heads,
        sizes=(
            *sums,
            (held, lists),
            *laid.of_heads(draft, name, f"{means} + {held}", MEANS_SHARE),
        ),
        turn=f"turn_{name}",
        buffers=tuple(of.buffer for of in made.values()),
        launches=tuple(of.launch for of in made.values()),
        makes=tuple(made),
    )


def _require_disjoint(node: Node, op: Attend) -> None:
    if op.size != op.stride:
        raise PlanError(
            f"branch {op.branch}: no kernel attends raw tokens of overlapping blocks "
            f"(size {op.size}, stride {op.stride})",
            span=node.span,
        )


def attend_by_blocks(draft: Draft, node: Node, op: Attend) -> None:
    """Blocks of a selection, each with the rows that chose it."""
    selection = draft.graph[node.inputs[3]]
    branch = buckets.Branch(
        name=op.branch,
        needs=draft.needs(node, *node.inputs),
        makes=draft.makes(node),
        selection=text.buffer(selection.name),
        keys=text.input_of(node.inputs[1]),
        tensors=draft.tensors(node, op),
        outputs=draft.outputs(node),
        buffers=draft.output_buffers(node),
        width=draft.width(selection),
        entries=Entries(size=op.size, stride=op.stride),
        scale=op.scale or 1.0,
        softcap=op.softcap,
        sink=draft.sink(node) is not None,
        turn=draft.turn(node),
    )
    kernels, step = buckets.plan(
        draft.shape_of(op), branch, lambda context: draft.row_tiles.attend(context, limit=64)
    )
    draft.kernels += kernels
    draft.steps.append(step)


def picks(draft: Draft, node: Node, op: Attend) -> bool:
    """Whether blocks are so small that a tile's tokens are gathered: half a step would have none."""
    if op.size >= LEAST_DOT or op.size != op.stride or op.latent:
        return False
    share = draft.graph[node.inputs[3]].type.dims[2]
    context = rows.attend_picked(
        draft.shape_of(op), name=op.branch, scale=op.scale or 1.0, share=share
    )
    return draft.picks(as_branch(draft, context, node, op))


def attend_picked(draft: Draft, node: Node, op: Attend) -> None:
    """Tokens of small blocks; or of entries under one softmax with a window, without what it has."""
    order = draft.orders.get(op.branch)
    if order == "keys":
        raise PlanError(
            f"branch {op.branch}: rows come to blocks only where no window has some of their tokens",
            span=node.span,
        )
    _require_disjoint(node, op)
    selection = draft.graph[node.inputs[3]]
    share, shape = selection.type.dims[2], draft.shape_of(op)
    window = left_to_window(draft.graph, node)

    def planned(*, alone: bool) -> rows.RowsContext:
        context = rows.attend_picked(
            shape, name=f"attend_{op.branch}", scale=op.scale or 1.0, share=share, alone=alone
        )
        return rows.with_pages(as_branch(draft, context, node, op), draft.page)

    context = planned(alone=False)
    if draft.picks(context):
        config = draft.tiles(context, limit=64, most=rows.PICKING, block=rows.MARKED)
    else:
        context = planned(alone=True)
        config = draft.row_tiles.attend(context, limit=64, most=rows.PICKING)
    bias = draft.bias(node)
    branch = picked.Branch(
        name=op.branch,
        needs=draft.needs(node, *node.inputs[:3], *node.inputs[4:]),
        makes=draft.makes(node),
        selection=selection.name,
        buffers=draft.output_buffers(node),
        tensors=draft.tensors(node, op),
        outputs=draft.outputs(node),
        block=draft.block(selection),
        heads=draft.size(share),
        width=draft.width(selection),
        size=op.size if op.over == "blocks" else 1,
        window=window,
        causal=shape.causal,
        held=4 * draft.held if bias else draft.held,  # beside a list of each row, longer than it
        least="SCRATCH_BYTES" if window else "SCRATCH_BYTES // 4",
        programs=str(shape.query_heads // context.heads),
        seq=draft.seq(context),
    )
    for listing in picked.listings(branch, config["BLOCK_T"]):
        draft.kernel("index", listing.context, listing.config, node.name, follows=context.name)
    draft.attend(context, config, *draft.makes(node))
    draft.add((), picked.steps(branch))


@dataclass(frozen=True, slots=True, kw_only=True)
class ByTiles:
    """The attend over the union lists of tiles; `sets`: of bits, as their pairs are too many to sort."""

    context: rows.RowsContext
    config: Config
    sets: bool


def attend_blocks(draft: Draft, node: Node, op: Attend) -> ByTiles:
    """Blocks of a selection."""
    _require_disjoint(node, op)
    selection = draft.graph[node.inputs[3]]
    width = draft.width(selection)

    def planned(*, sets: bool, most: int) -> ByTiles:
        context = rows.attend_blocks(
            draft.shape_of(op),
            name=f"attend_{op.branch}",
            scale=op.scale or 1.0,
            entries=Entries(size=op.size, stride=op.stride),
            width=width,
            share=selection.type.dims[2],
            sets=sets,
        )
        context = rows.with_pages(as_branch(draft, context, node, op), draft.page)
        if op.size < LEAST_STEP:
            most = min(most, max(1, 64 // context.heads))
        config = draft.tiles(context, limit=64, most=most, block=op.size)
        return ByTiles(context=context, config=config, sets=sets)

    found = planned(sets=False, most=128)
    if found.config["BLOCK_T"] * next_power(width) <= SORTED:
        return found
    if found.context.parts:  # whose programs are not one a tile and head
        return planned(sets=False, most=max(1, SORT_LIMIT // next_power(width)))
    return planned(sets=True, most=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """What makes the lists of a branch's tiles; `arguments`: of the kernel that walks them.

    `turn`: the size that says of how many of `tiles` at a time; None: of all.
    """

    launch: Launch
    arguments: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    sizes: tuple[tuple[str, str], ...]
    tiles: str | None = None
    turn: str | None = None


def index_blocks(draft: Draft, node: Node, op: Attend, found: ByTiles) -> Lists:
    """The union lists of each tile."""
    config, sets = found.config, found.sets
    name = f"attend_{op.branch}"
    selection = draft.graph[node.inputs[3]]
    width, heads = draft.width(selection), draft.size(selection.type.dims[2])
    index = IndexContext(
        name=f"index_{op.branch}",
        heads=heads,
        width=width,
        size=op.size,
        stride=op.stride,
        causal=draft.shape.causal,
        how="sets" if sets else "union",
    )
    pairs = config["BLOCK_T"] * next_power(width)
    if sets:
        step = max(16, SORTED // config["BLOCK_T"])
        values = (("BLOCK_K", min(step, next_power(width))), ("BLOCK_N", 256))
        listing = Config(constexprs=values, num_warps=8, num_stages=1)
    else:
        listing = Config(constexprs=(), num_warps=4 if pairs <= 1024 else 8, num_stages=1)
    draft.kernel("index", index, listing, node.name, follows=name)
    tiles, turn = f"tiles_{op.branch}", f"turn_{op.branch}"
    block_t = f'config["{name}"]["BLOCK_T"]'
    dims = (turn if sets else tiles, str(heads))
    slots = f"slots_{op.branch}"
    words = f"({block_t} + 31) // 32"
    chosen = text.buffer(selection.name)
    lists = (f"counts_{op.branch}", f"entries_{op.branch}", f"words_{op.branch}")
    given = _strided(chosen)
    sizes = [(tiles, f"batch.rows // {block_t} + batch.sequences")]
    buffers = (
        Buffer(name=f"counts_{op.branch}", dtype="i32", dims=(*dims, "2"), role="list"),
        Buffer(name=f"entries_{op.branch}", dtype="i32", dims=(*dims, slots), role="list"),
        Buffer(name=f"words_{op.branch}", dtype="i32", dims=(*dims, slots, words), role="list"),
    )
    if not sets:
        sizes.append((slots, f"{block_t} * {width}"))
        launch = Launch(kernel=index.name, grid=dims, arguments=(*given, *lists, *text.SEQ))
        return Lists(launch=launch, arguments=lists, buffers=buffers, sizes=tuple(sizes))
    length, each, room_for = (f"{x}_{op.branch}" for x in ("length", "marked", "room_for"))
    programs, marks, most = (f"{x}_{op.branch}" for x in ("programs", "marks", "most"))
    sizes += [
        (length, f"max(1, (batch.keys + {op.stride} - 1) // {op.stride})"),
        (slots, f"min({length}, {block_t} * {width})"),
        (f"bytes_{op.branch}", f"{4 * heads} * {slots} * (1 + {words})"),
        (most, f"max(SCRATCH_BYTES, batch.rows * {draft.held // 8})"),
        (turn, f"min({tiles}, max(1, {most} // bytes_{op.branch}))"),
        (each, f"{4 * heads} * {length} * ({words})"),
        (room_for, f"max(1, {most} // {each})"),
        (programs, f"min({turn}, {ROUNDS} * batch.processors // {heads} + 1, {room_for})"),
    ]
    room = (programs, str(heads), length, words)
    return Lists(
        launch=Launch(
            kernel=index.name,
            grid=(f"min(count, {programs})", str(heads)),
            arguments=(*given, *lists, marks, slots, length, "count", *text.SEQ, "tile_first"),
        ),
        arguments=(*lists, slots),
        buffers=(*buffers, Buffer(name=marks, dtype="i32", dims=room, role="list")),
        sizes=tuple(sizes),
        tiles=tiles,
        turn=turn,
    )


def attend_tokens(draft: Draft, node: Node, op: Attend) -> None:
    """Tokens of a selection: by tile over the union of blocks, or by row where that is dear.

    A caller's lists are in no order: where words say who chose what, they are walked as they lie, by tile.
    """
    scale = op.scale if op.scale is not None else 1.0
    name, gather = f"attend_{op.branch}", f"gather_{op.branch}"
    shape, selection = draft.shape_of(op), draft.graph[node.inputs[3]]
    width, heads = draft.width(selection), draft.size(selection.type.dims[2])
    share = selection.type.dims[2]
    if op.latent and share != "Hq" and shape.group >= TILE_OF_HEADS:
        attend_gathered(draft, node, op)
        return
    chosen = text.buffer(selection.name)
    taken = isinstance(selection.op, Recall)  # a caller's, in any order
    union = rows.attend_picked(shape, name=name, scale=scale, share=share, whole=taken)
    picked = draft.picks(as_branch(draft, union, node, op))
    alone = picked and taken
    if not picked:
        union = rows.attend_marked(shape, name=name, scale=scale, share=share)
    by_row = rows.attend_tokens(shape, name=gather, scale=scale, width=width, share=share)
    union, by_row = (as_branch(draft, each, node, op) for each in (union, by_row))
    union, by_row = (rows.with_pages(each, draft.page) for each in (union, by_row))
    config = draft.tiles(union, limit=64, block=rows.MARKED)
    gathering = draft.row_tiles.attend(by_row, tokens=1).without("BLOCK_T")
    marks = MarksContext(
        name=f"index_{op.branch}",
        heads=heads,
        width=width,
        causal=draft.shape.causal,
        how="picked" if picked else "marks",
        alone=alone,
    )
    dear = () if alone else (("DEAR", 2),)
    given = _strided(chosen) if alone else (chosen,)
    step = max(16, 4096 // config["BLOCK_T"])
    marking = Config(
        constexprs=(("BLOCK_K", min(step, next_power(width))), ("BLOCK_N", step), *dear),
        num_warps=8,
        num_stages=1,
    )
    draft.kernel("index", marks, marking, node.name, follows=name)
    draft.attend(union, config, *draft.makes(node))
    if not alone:
        draft.kernel("rows", by_row, gathering, *draft.makes(node), follows=name, by_slot=True)
    block_t = f'config["{name}"]["BLOCK_T"]'
    tiles, chunk = f"tiles_{op.branch}", f"chunk_{op.branch}"
    capacity = f"capacity_{op.branch}"
    lists = (f"counts_{op.branch}", f"entries_{op.branch}", f"{marks.words}_{op.branch}")
    words = (f"{chunk} * {block_t}", str(heads), capacity)
    keys = f"(batch.keys + {rows.MARKED} - 1) // {rows.MARKED}"
    bytes_, most = f"{8 * heads} * {capacity} * {block_t}", f"most_{op.branch}"
    short = f"short_{op.branch}"  # of short calls half of what rows have
    room = f"min(SCRATCH_BYTES, {short})"
    if picked:  # a tile's lists have room for all keys, and lists an eighth of what rows have
        words = (chunk, str(heads), capacity)
        keys, bytes_ = "batch.keys", f"{8 * heads} * {capacity}"
        room = f"max({room}, batch.rows * {draft.held // 8})"
    tensors = draft.tensors(node, op)
    draft.steps.append(
        Step(
            title=f"attend: {op.branch}",
            needs=draft.needs(node, *node.inputs),
            makes=draft.makes(node),
            sizes=(
                (capacity, f"max(1, {keys})"),
                (tiles, f"batch.rows // {block_t} + batch.sequences"),
                (f"bytes_{op.branch}", bytes_),
                (short, f"max(SCRATCH_BYTES // 4, batch.rows * {draft.held // 2})"),
                (most, room),
                (chunk, f"min({tiles}, max(1, {most} // bytes_{op.branch}))"),
                *text.parts(union, *(() if alone else (by_row,))),
            ),
            buffers=(
                Buffer(name=lists[0], dtype="i32", dims=(chunk, str(heads)), role="list"),
                Buffer(name=lists[1], dtype="i32", dims=(chunk, str(heads), capacity), role="list"),
                Buffer(
                    name=lists[2],
                    dtype="i32" if picked else "i64",
                    dims=words,
                    role="list",
                ),
                *draft.output_buffers(node),
            ),
            launches=(
                Launch(
                    kernel=marks.name,
                    grid=("count", str(heads)),
                    arguments=(*given, *lists, capacity, *text.SEQ, "tile_first"),
                ),
                draft.launch(
                    Launch(
                        kernel=name,
                        grid=text.grid(shape, union, "count"),
                        arguments=(
                            *tensors,
                            *lists,
                            capacity,
                            *draft.outputs(node),
                            *draft.seq(union),
                            "tile_first",
                        ),
                    )
                ),
                *(
                    ()
                    if alone
                    else (
                        Launch(
                            kernel=gather,
                            grid=text.grid(shape, by_row, f"count * {block_t}"),
                            arguments=(
                                *tensors,
                                chosen,
                                lists[0],
                                *draft.outputs(node),
                                *draft.seq(by_row),
                                "tile_first",
                            ),
                        ),
                    )
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )


def _strided(chosen: str) -> tuple[str, ...]:
    """A selection as it lies, and its strides."""
    strides = tuple(f"{chosen}.stride({dim})" for dim in (1, 2, 3))
    return (chosen, f"0 if batch.packed else {chosen}.stride(0)", *strides)


def attend_gathered(draft: Draft, node: Node, op: Attend) -> None:
    """Pooled entries of a selection, or tokens where one's heads fill a tile: each row by its own list."""
    name, tiles = f"attend_{op.branch}", f"tiles_{op.branch}"
    shape, selection = draft.shape_of(op), draft.graph[node.inputs[3]]
    context = rows.attend_tokens(
        shape,
        name=name,
        scale=op.scale if op.scale is not None else 1.0,
        width=draft.width(selection),
        share=selection.type.dims[2],
        alone=True,
        entries=draft.pooled_entries(node.inputs[1]) if op.over == "pooled" else None,
    )
    context = as_branch(draft, context, node, op)
    if op.over != "pooled":
        context = rows.with_pages(context, draft.page)
    draft.attend(context, draft.gather_tiles(context), *draft.makes(node))
    launch = Launch(
        kernel=name,
        grid=text.grid(shape, context, f"{tiles} * {{BLOCK_T}}"),
        arguments=(
            *draft.tensors(node, op),
            text.buffer(selection.name),
            *draft.outputs(node),
            *draft.seq(context),
        ),
    )
    draft.steps.append(
        Step(
            title=f"attend: {op.branch}",
            needs=draft.needs(node, *node.inputs),
            makes=draft.makes(node),
            sizes=((tiles, text.tiles_of(name)), *text.parts(context)),
            buffers=draft.output_buffers(node),
            launches=(draft.launch(launch),),
        )
    )


def as_branch(draft: Draft, context: rows.RowsContext, node: Node, op: Attend) -> rows.RowsContext:
    """With what a branch says of its logits, and of its part in a sum."""
    scale = op.scale if op.scale is not None else 1.0
    sink = draft.sink(node) is not None
    context = rows.with_logits(context, scale=scale, softcap=op.softcap, sink=sink)
    if op.biased:
        context = rows.with_bias(context, scale=scale)
    return rows.with_turn(context, draft.turn(node))
