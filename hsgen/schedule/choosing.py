"""Launches that choose: scores of a turn of rows into a scratch, and the best of each row out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from hsgen import axes, configs, estimates, foretold, refusals, rows, splits, stripes, together
from hsgen.errors import PlanError
from hsgen.graph import (
    Anchors,
    Graph,
    Input,
    Map,
    Node,
    Normalise,
    Reduce,
    Score,
    Select,
    SelectSet,
    Tiers,
    Unlike,
    own_entries,
)
from hsgen.halved import HalvedContext
from hsgen.kernels import RankContext, ThresholdContext
from hsgen.pairs import PairsContext
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import Entries
from hsgen.schedule import laid, likening, sorted_keys, text
from hsgen.schedule.draft import Draft

LEAST_STEPS = 8  # of a share of the longest row's keys


def select(draft: Draft, node: Node, op: Select | SelectSet) -> None:
    """Score into a bounded scratch and rank it, chunk of rows by chunk of rows.

    Of a step whose scores an attend has left all but done, one launch does both.
    """
    if isinstance(op, SelectSet) and op.rule == "threshold":
        _select_above(draft, node, op)
        return
    if isinstance(op, SelectSet) and refusals.of_pairs(op):
        _select_pairs(draft, node, op)
        return
    chain = _chain(draft, node)
    left = draft.left.get(node.name)
    heads = draft.size(node.type.dims[2])
    kept = op if isinstance(op, Select) else None
    parent = draft.graph[node.inputs[1]] if kept and kept.within else None
    block = draft.block(node)
    part, held = (
        part_of(draft.graph, node),
        slots_of(draft, node) if block else str(kept and kept.width),
    )
    scorer = _scorer(draft, node, chain, parent)
    context, config, programs = scorer.context, scorer.config, scorer.programs
    if left is None:
        scorer.add(draft, *chain.names)
    planes = 1 if left else context.planes
    children, slots, parent_heads, parent_group = 0, 0, 1, 1
    if parent is not None:
        assert isinstance(parent.op, Select)
        children = parent.op.size // op.size
        slots = draft.width(parent) * children
        parent_heads = draft.size(parent.type.dims[2])
        parent_group = heads // parent_heads
    rank = replace(
        ranking(draft, node, op, short=draft.short(op.level), anchors=chain.anchors),
        children=children,
        parent_width=draft.width(parent) if parent else 0,
        parent_heads=parent_heads,
        parent_group=parent_group,
        carried=context.folded if planes > 1 else "",
        alike=context.alike,
        wide=isinstance(context, rows.RowsContext) and context.by_shares,
        few=draft.tiling is not None and not (scorer.parts > 1 or left),
        fours=_by_fours(context),
        summed=draft.shape.group if left else 0,
        planes=left.planes if left else 0,
        parts=scorer.parts,
        parts_how="max" if chain.reduce and chain.reduce.how == "max" else "sum",
    )
    unlike = _unlike_of(draft, node)
    if _softmaxed(draft, node):
        group = draft.shape.group if heads == draft.shape.query_heads else 1
        rank = replace(rank, softmax=True, unlike=group if unlike else 0)
    grouped = rank.group > 0
    ranks = configs.rank(
        draft.tiling.tiles if draft.tiling else rank.longest if chain.anchors else slots,
        op.stride,
        config["BLOCK_T"],
        grouped=grouped,
        chunked=rank.chunked,
        kept=rank.kept,
        wide=rank.paired,
    )
    if rank.softmax:
        ranks = configs.rank_by_mass(op.stride)
    if draft.steps_alone:
        ranks = configs.rank_steps(
            slots, op.stride, grouped=grouped, kept=rank.kept, scores=left is not None
        )
    ranker = draft.kernel(
        "rank",
        rank,
        ranks,
        *(chain.names if left else ()),
        node.name,
        follows=None if left else context.name,
    )
    capacity, row = f"capacity_{op.level}", _row_length(rank, op.stride)
    scratch = f"scores_{op.level}"
    scores = Launch(
        kernel=context.name,
        grid=(scorer.count, str(programs), *scorer.shares),
        arguments=_score_arguments(draft, chain, parent, context, scratch),
    )
    block_t = f'config["{rank.name if left else context.name}"]["BLOCK_T"]'
    tiles, chunk = f"tiles_{op.level}", f"chunk_{op.level}"
    choosing, listed = "batch.rows", ("in_q.shape[0]", "in_q.shape[1]")
    made = node.name
    if block:
        choosing, made = f"blocks_{op.level}", chosen_of(node)
        listed = (choosing,)
    draft.steps.append(
        Step(
            title=f"choose: {op.level}",
            needs=(
                *((left.step,) if left else chain.needs),
                *((_listed(draft, parent),) if parent else ()),
                *((unlike.name,) if unlike else ()),
                *sorted_keys.order(draft, node),
                *way_of(node),
            ),
            makes=(made,),
            sizes=(
                *(((choosing, together.blocks_of(block)),) if block else ()),
                *(part.sizes(op.level) if part else ()),
                (capacity, str(slots) if slots else row),
                *_room(rank, op.level),
                (
                    tiles,
                    "batch.sequences"
                    if context.alike
                    else f"{choosing} // {block_t} + batch.sequences",
                ),
                (
                    f"bytes_{op.level}",
                    f"{_row_bytes(rank, op.level, planes * scorer.parts)} * {block_t}",
                ),
                *(
                    _chunk_of_shares(draft, op.level, heads, int(held))
                    if isinstance(context, rows.RowsContext) and context.by_shares
                    else chunk_of(
                        draft,
                        op.level,
                        programs if "STAGES" in dict(config.constexprs) else 0,
                        children=bool(context.children),
                    )
                ),
                *scorer.by_shares,
            ),
            buffers=(
                Buffer(
                    name=scratch,
                    dtype="f32",
                    dims=(
                        f"{chunk} * {block_t}",
                        str(heads),
                        *(("2",) if planes > 1 else ()),
                        capacity,
                        *((str(scorer.parts),) if scorer.parts > 1 else ()),
                    ),
                    role="scratch",
                ),
                *_kept(rank, op.level, f"{chunk} * {block_t}"),
                Buffer(
                    name=text.buffer(made),
                    dtype="i32",
                    dims=(*listed, str(heads), held),
                    role="list" if block else "selection",
                ),
            ),
            launches=(
                *((draft.launch(scores),) if left is None else ()),
                Launch(
                    kernel=ranker,
                    grid=(f"count * ({block_t} // {{BLOCK_R}})", str(heads)),
                    arguments=(
                        *((*left.lse, left.buffer, left.length) if left else ()),
                        scratch,
                        text.buffer(made),
                        *((_list_of(draft, parent),) if parent else ()),
                        *(likening.flags(unlike) if unlike else ()),
                        *sorted_keys.sinks(draft, node),
                        *(text.input_of(name) for name in way_of(node)),
                        *((f"kept_{op.level}",) if rank.sampled else ()),
                        *text.SEQ,
                        "tile_first",
                        capacity,
                        *((held,) if part else ()),
                    ),
                    given=(("BLOCK_P", f"padded_{left.kernel}"),) if left else (),
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
    if block:
        spread(draft, node, op, heads, block)


def way_of(node: Node) -> tuple[str, ...]:
    """What says which way each head takes, where some choose none."""
    return node.inputs[-1:] if isinstance(node.op, Select) and node.op.ways else ()


def _softmaxed(draft: Draft, node: Node) -> bool:
    """Whether masses are made of logits where they are ranked."""
    return refusals.held_masses(draft.graph, draft.graph[node.inputs[0]])


def _unlike_of(draft: Draft, node: Node) -> Node | None:
    """What says which entries are forced by their tokens."""
    return next((x for x in draft.graph.operands(node) if isinstance(x.op, Unlike)), None)


def ranking(
    draft: Draft,
    node: Node,
    op: Select | SelectSet,
    *,
    short: bool,
    anchors: Anchors | None = None,
) -> RankContext:
    """Which entries of a row are kept, whatever made their scores."""
    kept = op if isinstance(op, Select) else None
    found = part_of(draft.graph, node)
    by_mass = op if isinstance(op, SelectSet) and op.rule == "top_p" else None
    by_budget = op if isinstance(op, SelectSet) and op.rule == "budget_from" else None
    tiers = tiers_of(op)
    return RankContext(
        name=f"rank_{op.level}",
        heads=draft.size(node.type.dims[2]),
        k=kept.k if kept else 0,
        width=kept.width if kept else 0,
        size=draft.reach(op, op.level),
        stride=op.stride,
        short=short,
        causal=draft.shape.causal,
        first=op.first,
        last=op.last,
        counted=op.counted,
        tail=bool(op.tail),
        rows=draft.block(node),
        part=found.units if found and not (by_mass or by_budget or tiers) else 0,
        of_all=isinstance(op, SelectSet) and op.of == "all",
        mass=_mass_of(by_mass) if by_mass else 0,
        drop=bool(by_mass and by_mass.boundary == "drop"),
        rest=bool(by_mass and by_mass.of == "rest"),
        least=(isinstance(op, SelectSet) and (by_mass or by_budget) and op.least) or 0,
        budget=by_budget is not None,
        tiers=ends_of(tiers) if tiers else (),
        segment=sorted_keys.segment(draft, node),
        sinks=op.sink or 0,
        kv_heads=draft.shape.kv_heads if op.sink else 0,
        ways=(kept.ways if kept else None) or (),
        power=anchors.power if anchors else 0,
        nearest=anchors.first if anchors else 1,
    )


def _mass_of(op: SelectSet) -> int:
    """The part of all masses in units of 2^-30, rounded against the way in which its product is."""
    if op.boundary == "drop":
        return math.ceil(op.value * (1 << 30))
    return together.Part.units_of(op.value)


def ends_of(tiers: Tiers) -> tuple[tuple[int, int], ...]:
    """Up to each tier, the part of all masses and of the candidates."""
    if tiers.by == "mass":
        return tuple((part, least) for _, part, least in tiers.steps)
    return tuple((0, max(part, least)) for _, part, least in tiers.steps)


def _select_above(draft: Draft, node: Node, op: SelectSet) -> None:
    """Score blocks of rows into a bounded scratch, and keep what has enough of a row's softmax."""
    chain, heads, block = _chain(draft, node), draft.size(node.type.dims[2]), draft.block(node)
    part = part_of(draft.graph, node)
    assert part is not None, "refused"
    context = _walk(draft, node, chain, None)
    draft.attend(context, draft.row_tiles_of_blocks.score(context), *chain.names)
    ranking = ThresholdContext(
        name=f"rank_{op.level}",
        heads=heads,
        rows=block,
        size=op.size,
        stride=op.stride,
        short=draft.short(op.level),
        causal=draft.shape.causal,
        first=op.first,
        last=op.last,
        threshold=op.value,
    )
    config = configs.threshold(op.stride)
    ranker = draft.kernel("rank", ranking, config, node.name, follows=context.name)
    blocks, tiles, chunk = (f"{of}_{op.level}" for of in ("blocks", "tiles", "chunk"))
    capacity, scratch = f"capacity_{op.level}", f"scores_{op.level}"
    block_t = f'config["{context.name}"]["BLOCK_T"]'
    lists = Buffer(
        name=text.buffer(f"{node.name}.blocks"),
        dtype="i32",
        dims=(blocks, str(heads), draft.slots(node)),
        role="list",
    )
    dims = (f"{chunk} * {block_t}", str(heads), capacity)
    draft.steps.append(
        Step(
            title=f"choose: {op.level}",
            needs=chain.needs,
            makes=(f"{node.name}.blocks",),
            sizes=(
                (blocks, together.blocks_of(block)),
                *part.sizes(op.level),
                (capacity, f"max(1, batch.keys // {op.stride} + 1)"),
                (tiles, f"{blocks} // {block_t} + batch.sequences"),
                (f"bytes_{op.level}", f"{4 * heads} * {capacity} * {block_t}"),
                *chunk_of(draft, op.level, 0, children=False),
            ),
            buffers=(Buffer(name=scratch, dtype="f32", dims=dims, role="scratch"), lists),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=("count", str(heads)),
                    arguments=_score_arguments(draft, chain, None, context, scratch),
                ),
                Launch(
                    kernel=ranker,
                    grid=(f"count * ({block_t} // {{BLOCK_R}})", str(heads)),
                    arguments=(
                        scratch,
                        lists.name,
                        *text.SEQ,
                        "tile_first",
                        capacity,
                        draft.slots(node),
                    ),
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )
    spread(draft, node, op, heads, block)


def _select_pairs(draft: Draft, node: Node, op: SelectSet) -> None:
    """Score all blocks of rows, and keep the best pairs of each head."""
    chain, heads, block = _chain(draft, node), draft.size(node.type.dims[2]), draft.block(node)
    part = part_of(draft.graph, node)
    assert part is not None, "refused"
    context = _walk(draft, node, chain, None)
    draft.attend(context, draft.row_tiles_of_blocks.score(context), *chain.names)
    by_mass, route = op.rule == "top_p", _route_of(draft, node)
    masses = PairsContext(
        name=f"mass_{op.level}",
        how="masses",
        heads=heads,
        rows=block,
        size=op.size,
        stride=op.stride,
        short=draft.short(op.level),
        causal=draft.shape.causal,
        first=op.first,
        last=op.last,
        counted=op.counted,
        part=0 if by_mass else together.Part.units_of(op.value),
        mass=_mass_of(op) if by_mass else 0,
        drop=op.boundary == "drop",
        slotted=draft.tiling is not None,
        way=foretold.way_of(node, route) if route else None,
    )
    edges = replace(masses, name=f"edge_{op.level}", how="edges")
    lists = replace(masses, name=f"rank_{op.level}", how="lists")
    for each in (masses, edges, lists):
        names = chain.names[1:] if each is masses else (node.name,)
        draft.kernel("rank", each, configs.pairs(each), *names, follows=context.name)
    blocks, tiles, slots = (f"{of}_{op.level}" for of in ("blocks", "tiles", "places"))
    capacity, scratch = f"capacity_{op.level}", f"scores_{op.level}"
    there, ends, before = (f"{of}_{op.level}" for of in ("there", "edges", "before"))
    block_t = f'config["{context.name}"]["BLOCK_T"]'
    made = chosen_of(node)
    dims = (slots, str(heads))
    scratches = (
        Buffer(name=scratch, dtype="f32", dims=(*dims, capacity), role="scratch"),
        Buffer(name=there, dtype="i32", dims=(slots,), role="scratch"),
        Buffer(name=ends, dtype="i32", dims=("batch.sequences", str(heads), "3"), role="scratch"),
        Buffer(name=before, dtype="i32", dims=dims, role="scratch"),
    )
    order = (axes.MADE_ORDER,) if masses.slotted else ()
    every = (f"{tiles} * {block_t}", str(heads))
    read = (scratch, there, ends, before)
    ways = (text.buffer(route.name),) if route else ()
    draft.steps.append(
        Step(
            title=f"choose: {op.level}",
            needs=(*chain.needs, *((route.name,) if route else ())),
            makes=(made,),
            sizes=(
                (blocks, together.blocks_of(block)),
                *part.sizes(op.level),
                (capacity, f"max(1, batch.keys // {op.stride} + 1)"),
                (tiles, f"{blocks} // {block_t} + batch.sequences"),
                (slots, f"{tiles} * {block_t}"),
            ),
            buffers=(
                *scratches,
                Buffer(
                    name=text.buffer(made),
                    dtype="i32",
                    dims=(blocks, str(heads), draft.slots(node)),
                    role="list",
                ),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(tiles, str(heads)),
                    arguments=(*_score_arguments(draft, chain, None, context, scratch)[:-1], "0"),
                ),
                Launch(
                    kernel=masses.name,
                    grid=every,
                    arguments=(scratch, there, *order, *text.SEQ, capacity),
                ),
                Launch(
                    kernel=edges.name,
                    grid=("batch.sequences", str(heads)),
                    arguments=(*read, *ways, *text.SEQ, capacity),
                ),
                Launch(
                    kernel=lists.name,
                    grid=every,
                    arguments=(
                        *read,
                        text.buffer(made),
                        *ways,
                        *text.SEQ,
                        capacity,
                        draft.slots(node),
                    ),
                ),
            ),
        )
    )
    spread(draft, node, op, heads, block)


def _route_of(draft: Draft, node: Node) -> Node | None:
    """What says which heads choose, where some do not."""
    assert isinstance(node.op, SelectSet)
    return draft.graph[node.inputs[-1]] if node.op.when else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scorer:
    """The kernel that scores, its tiles and its programs: `count` of tiles, heads, and shares of entries."""

    context: rows.RowsContext | HalvedContext
    config: Config
    programs: int
    count: str = "count"
    shares: tuple[str, ...] = ()
    by_shares: tuple[tuple[str, str], ...] = ()
    parts: int = 1  # of the heads that agree, which the rank puts together

    def add(self, draft: Draft, *nodes: str) -> None:
        if isinstance(self.context, HalvedContext):
            draft.kernel("halved", self.context, self.config, *nodes)
        else:
            draft.attend(self.context, self.config, *nodes)


def _scorer(draft: Draft, node: Node, chain: _Chain, parent: Node | None) -> _Scorer:
    """What makes the scores that a selection is made of."""
    heads = draft.size(node.type.dims[2])
    score = chain.score.op
    if isinstance(score, Score) and score.halves is not None:
        context = _halved(draft, node, chain, parent)
        step, programs = f"step_{score.level}", f"shares_{score.level}"
        return _Scorer(
            context=context,
            config=configs.halved(draft.dtype),
            programs=heads * context.parts,
            count="count * {BLOCK_T}",
            shares=(programs,),
            by_shares=(
                (step, f'config["{context.name}"]["BLOCK_N"]'),
                (programs, f"(capacity_{score.level} + {step} - 1) // {step}"),
            ),
            parts=context.parts,
        )
    context = _walk(draft, node, chain, parent)
    programs = heads // (context.heads if _packs(draft, chain, parent) else 1)
    count = "count * {BLOCK_T}" if context.one_token else "count"
    shares: tuple[str, ...] = ()
    by_shares: tuple[tuple[str, str], ...] = ()
    block = draft.block(node)
    if draft.steps_alone and node.name not in draft.left:
        by_shares = _shares(draft, context, chain, parent, programs)
        shares = (by_shares[-1][0],)
    tiling = draft.row_tiles_of_blocks if block else draft.row_tiles
    tiles = tiling.step if shares else tiling.score if block else draft.score_tiles
    config = tiles(context)
    if context.by_shares:
        assert isinstance(score, Score)
        by_shares = _shares_of_tiles(context, score.level, programs)
        shares = (by_shares[-1][0],)
    return _Scorer(
        context=context,
        config=config,
        programs=programs,
        count=count,
        shares=shares,
        by_shares=by_shares,
    )


def _halved(draft: Draft, node: Node, chain: _Chain, parent: Node | None) -> HalvedContext:
    """The search of a level's intervals by blocks of rows."""
    score = chain.score.op
    assert isinstance(score, Score)
    assert score.halves is not None
    share = chain.reduce.share if chain.reduce else "head"
    below = _parent(draft, node, parent)
    width = below.get("parent_width", 0)
    return HalvedContext(
        name=f"score_{score.level}",
        heads={"head": 1, "group": draft.shape.group, "all": draft.shape.query_heads}[share],
        group=draft.shape.group,
        qk_chunks=rows.chunks(draft.shape.qk),
        rows=draft.block(node),
        size=score.size,
        until=score.halves.until,
        short=draft.short(score.level),
        causal=draft.shape.causal,
        scale=score.scale if score.scale is not None else 1.0,
        reduce=chain.reduce.how if chain.reduce else "max",
        precision=draft.shape.precision,
        children=below["parent_size"] // score.size if "parent_size" in below else 0,
        parent_width=width,
        parent_heads=below.get("parent_heads", 1),
        parent_head=below.get("parent_head", "head"),
    )


def _listed(draft: Draft, parent: Node) -> str:
    """What is made of survivors: of blocks of rows a list each."""
    return f"{parent.name}.blocks" if draft.block(parent) else parent.name


def _list_of(draft: Draft, parent: Node) -> str:
    """The same, in the driver."""
    return text.buffer(_listed(draft, parent))


def _walk(draft: Draft, node: Node, chain: _Chain, parent: Node | None) -> rows.RowsContext:
    """The loops of the scores, as those of a step share them."""
    context = _score_context(draft, node, chain, parent)
    if draft.tiling is not None and not (context.keys_first or context.children):
        context = replace(context, by_parts=True)
    if draft.pool_of(chain.score.inputs[1]) is None:
        context = rows.with_pages(context, draft.page)
    if not draft.steps_alone:
        return rows.with_shares(context) if _fills_scratch(draft, node, context, chain) else context
    context = rows.with_split(context)
    return rows.with_fours(context) if _by_fours(context) else context


def _fills_scratch(draft: Draft, node: Node, context: rows.RowsContext, chain: _Chain) -> bool:
    """Whether tiles of rows leave so many scores that a scratch has few: masses of tokens, by key head."""
    score = chain.score.op
    assert isinstance(score, Score)
    if draft.cached is not None or chain.lse is None:
        return False
    alone = not (context.across or context.folded or context.children or draft.block(node))
    return alone and score.stride == 1 and draft.size(node.type.dims[2]) == draft.shape.kv_heads > 1


def _by_fours(context: rows.RowsContext | HalvedContext) -> bool:
    """Whether scores of a step may be there up to a multiple of four: entries that are scored in order."""
    if isinstance(context, HalvedContext):
        return False
    return context.alike and [x.kind for x in context.phases] == ["range"] and not context.folded


def _row_length(ranking: RankContext, stride: int) -> str:
    """From a row of the scratch to the next, if it has a slot for each entry."""
    if ranking.chunked:
        held = ranking.whole - 4
        return f"(batch.keys // {stride} + {held + 1}) // {held} * {ranking.whole}"
    if ranking.power:
        return "batch.squares + 1"
    if ranking.whole_fours:
        return f"(batch.keys // {stride} + 5) // 4 * 4"
    return f"max(1, batch.keys // {stride} + 1)"


def _row_bytes(ranking: RankContext, level: str, planes: int) -> str:
    """Bytes of scratch for a row: its scores, and what is copied of them."""
    scores = f"{4 * ranking.heads * planes} * capacity_{level}"
    if not ranking.sampled:
        return scores
    return f"({scores} + {8 * ranking.heads} * room_{level})"


def _room(ranking: RankContext, level: str) -> tuple[tuple[str, str], ...]:
    """How many keys of a row are copied at most."""
    room = f'config["{ranking.name}"]["BLOCK_N"]'
    return ((f"room_{level}", room),) if ranking.sampled else ()


def _kept(ranking: RankContext, level: str, rows_: str) -> tuple[Buffer, ...]:
    """What is copied of rows that do not fit in registers: keys, and their entries."""
    if not ranking.sampled:
        return ()
    dims = (rows_, str(ranking.heads), "2", f"room_{level}")
    return (Buffer(name=f"kept_{level}", dtype="i32", dims=dims, role="scratch"),)


def chunk_of(
    draft: Draft, level: str, heads: int, *, children: bool, part: int | None = None
) -> tuple[tuple[str, str], ...]:
    """How many tiles of rows a scratch holds.

    `heads`: of a kernel that runs one program a processor, tile after tile, and starts and ends slowly: it
    has an eighth of the bytes of queries and outputs, and tiles that leave no processor idle in the last
    round.  Where rows are so long that these do not fill one, it has a round if that is at most a quarter
    of those bytes, or four scratches.  0: of another.

    A short call has a quarter of those bytes, or an eighth where entries that all rows see come in a stream,
    or one of so many parts as is said; at least three sixteenths of a scratch.  Few rows behind a cache may
    see many keys: they have a whole one.
    """
    bytes_, chunk, most = f"bytes_{level}", f"chunk_{level}", f"most_{level}"
    if draft.cached is not None:
        return ((chunk, f"min(tiles_{level}, max(1, SCRATCH_BYTES // {bytes_}))"),)
    part = part or (8 if heads and not children else 4)
    short, scratch = f"short_{level}", f"scratch_{level}"
    usual, round_ = f"usual_{level}", f"round_{level}"
    least = (short, f"max(3 * SCRATCH_BYTES // 16, batch.rows * {draft.held // part})")
    if not heads:
        return (
            least,
            (scratch, f"min(SCRATCH_BYTES, {short})"),
            (chunk, f"min(tiles_{level}, max(1, {scratch} // {bytes_}))"),
        )
    return (
        least,
        (usual, f"min(SCRATCH_BYTES, {short})"),
        (scratch, f"max({usual}, batch.rows * {draft.held // 8})"),
        (most, f"max(1, {scratch} // {bytes_})"),
        (f"rounds_{level}", f"{most} * {heads} // batch.processors"),
        (round_, f"4 * max({usual}, {scratch} // 2) // {bytes_}"),
        (f"least_{level}", f"min({round_}, batch.processors // {heads})"),
        (f"whole_{level}", f"max(rounds_{level} * batch.processors // {heads}, least_{level})"),
        (chunk, f"min(tiles_{level}, max(1, whole_{level}))"),
    )


def _chunk_of_shares(
    draft: Draft, level: str, heads: int, width: int
) -> tuple[tuple[str, str], ...]:
    """How many tiles of rows a scratch holds whose shares of keys fill the processors.

    A call has an eighth of the bytes of queries, outputs and lists, at least three sixteenths of a scratch
    and at most two: turns that end with few programs cost more than what the cache does not hold.
    """
    bytes_, short, scratch = f"bytes_{level}", f"short_{level}", f"scratch_{level}"
    part = (draft.held + 4 * heads * width) // 8
    return (
        (short, f"max(3 * SCRATCH_BYTES // 16, batch.rows * {part})"),
        (scratch, f"min(2 * SCRATCH_BYTES, {short})"),
        (f"chunk_{level}", f"min(tiles_{level}, max(1, {scratch} // {bytes_}))"),
    )


def _shares(
    draft: Draft, context: rows.RowsContext, chain: _Chain, parent: Node | None, heads: int
) -> tuple[tuple[str, str], ...]:
    """The sizes that say how many programs share the entries of a row of scores."""
    score = chain.score.op
    assert isinstance(score, Score)
    keys = text.per_stride("batch.keys", score.stride)
    if parent is not None:
        assert isinstance(parent.op, Select)
        keys = str(draft.width(parent) * parent.op.size // score.size)
    sms = draft.target.sms
    long = f"({splits.SCORED} * SHARE_KEYS)"
    return splits.shares(
        context.name, sms=sms, rows_of="batch.sequences", heads=heads, keys=keys, long=long
    )


def _shares_of_tiles(
    context: rows.RowsContext, level: str, heads: int
) -> tuple[tuple[str, str], ...]:
    """The sizes that say how many programs share the entries of a tile of rows; the last is how many.

    As many as keep all processors busy in two rounds of a turn, but no share has less than some steps.
    """
    step = f"step_{level}"
    return (
        (step, f'config["{context.name}"]["BLOCK_N"]'),
        (f"there_{level}", f"chunk_{level} * {heads}"),
        (f"steps_{level}", f"(batch.keys + {step} - 1) // {step}"),
        (f"fills_{level}", f"(2 * batch.processors + there_{level} - 1) // there_{level}"),
        (f"shares_{level}", f"max(1, min(fills_{level}, steps_{level} // {LEAST_STEPS}))"),
    )


def tiers_of(op: Select | SelectSet) -> Tiers | None:
    """The tiers of a pyramid."""
    return op.tiers if isinstance(op, SelectSet) else None


def chosen_of(selection: Node) -> str:
    """What is made for blocks of rows: of each a list, or the tier of every entry.

    Tiers are made also where a caller brings a selection, which has none.
    """
    assert isinstance(selection.op, Select | SelectSet)
    return f"{selection.name}.{'tiers' if tiers_of(selection.op) else 'blocks'}"


def slots_of(draft: Draft, selection: Node) -> str:
    """How long a row of that is, as an expression."""
    assert isinstance(selection.op, Select | SelectSet)
    if tiers_of(selection.op):
        return f"max(1, entries_{selection.op.level})"
    return draft.slots(selection)


def spread(
    draft: Draft,
    node: Node,
    op: Select | SelectSet,
    heads: int,
    block: int,
    bits: str | None = None,
) -> None:
    """Every row's copy of the list of its block, which may be one of so many words of bits."""
    kernel, step = together.spread(
        op.level,
        node.name,
        chosen=chosen_of(node),
        width=draft.slots(node),
        heads=heads,
        block=block,
        slotted=draft.tiling is not None,
        entries=slots_of(draft, node) if tiers_of(op) else None,
        bits=bits,
    )
    draft.kernels.append(kernel)
    draft.steps.append(step)


def _chain(draft: Draft, node: Node) -> _Chain:
    """Back from a selection to its score: map, reduce, normalise in the fixed order of steps."""
    passed: list[Node] = []
    current = draft.graph[node.inputs[0]]
    while not isinstance(current.op, Score):
        if not isinstance(current.op, Map | Reduce | Normalise):
            raise PlanError(f"no kernel chooses from %{current.name}", span=node.span)
        passed.insert(0, current)
        current = draft.graph[current.inputs[0]]
    lse = next((n.inputs[1] for n in passed if isinstance(n.op, Normalise)), None)
    held = bool(passed) and refusals.held_masses(draft.graph, passed[0])
    return _Chain(
        score=current,
        names=(current.name, *((lse,) if held and lse else ()), *(n.name for n in passed)),
        lse=None if held else lse,  # which is summed where masses are held against it
        reduce=next((n.op for n in passed if isinstance(n.op, Reduce)), None),
        map=next((n.op for n in passed if isinstance(n.op, Map) and not n.op.before), None),
    )


def _score_context(
    draft: Draft, node: Node, chain: _Chain, parent: Node | None
) -> rows.RowsContext:
    score = chain.score.op
    assert isinstance(score, Score)
    assert isinstance(node.op, Select | SelectSet)
    weighted = score.form in ("relu_weighted", "relu_sum")
    if _of_all_heads(draft, chain):
        scoring = _scoring(draft, node, replace(chain, reduce=None), parent, "head")
        whole = draft.shape.kv_heads * draft.shape.qk
        shape = replace(draft.shape, query_heads=1, kv_heads=1, qk=whole)
        return rows.score(shape, scoring, name=f"score_{node.op.level}", heads=1, dim=whole)
    across = 0
    if chain.reduce is not None and chain.reduce.share == "all":
        across = _across(draft, node, chain)
    if chain.lse is not None and parent is not None:
        message = f"level {node.op.level}: no kernel normalises scores inside a beam yet"
        raise PlanError(message, span=chain.score.span)
    share: Literal["head", "group", "all"] = chain.reduce.share if chain.reduce else "head"
    if weighted:
        share = "group" if score.grouped else "all"
    shape = _asking(draft, chain)
    of_all = shape.group if across else draft.graph.sizes.get("Hi", 1)
    of_group = of_all // shape.kv_heads if weighted else shape.group
    heads = {"head": 1, "group": of_group, "all": of_all}[share]
    scoring = _scoring(draft, node, chain, parent, share)
    if scoring.packed:
        heads = shape.group
    dim = draft.graph.sizes["Di"] if scoring.by_index else shape.qk
    name = f"score_{node.op.level}"
    if score.anchors is not None:
        return stripes.score(shape, scoring, score.anchors, name=name)
    return rows.score(shape, scoring, name=name, heads=heads, dim=dim, across=across)


def _across(draft: Draft, node: Node, chain: _Chain) -> int:
    """How many key heads have scores that are made one: a program has them one by one.

    Raises:
        PlanError: rows choose together, or scores are carried over tap by tap: no loop is that deep.
    """
    score = chain.score.op
    assert isinstance(score, Score)
    assert isinstance(node.op, Select | SelectSet)
    assert score.form in ("dot", "bound"), "others are of an index"
    level = node.op.level
    if draft.block(node):
        message = f"level {level}: no kernel reduces scores of blocks of rows over all heads yet"
        raise PlanError(message, span=chain.score.span, help="write `share: group`")
    scoring = _scoring(draft, node, chain, None, "all")
    if scoring.map_how and not scoring.folded:
        raise PlanError(
            f"level {level}: no kernel maps scores of all heads but of 2, 4, 8 or 16 entries to one yet",
            span=chain.score.span,
        )
    return draft.shape.kv_heads


def _asking(draft: Draft, chain: _Chain) -> rows.Shape:
    """Heads of the queries that score: those of attention, or as few as there are of keys."""
    return replace(draft.shape, query_heads=draft.size(_heads_asking(draft, chain)))


def _heads_asking(draft: Draft, chain: _Chain) -> str:
    return "Hkv" if "Hkv" in _scored(draft, chain)[0].type.dims else "Hq"


def summed_scores(draft: Draft, normalised: Node) -> list[tuple[Node, rows.Scoring]]:
    """The selections made of weights that are summed over a group's heads, and how they come of these."""
    graph, found = draft.graph, list[tuple[Node, rows.Scoring]]()
    for reduced in graph.users(normalised.name):
        if not isinstance(reduced.op, Reduce) or reduced.op.share != "group":
            continue
        for user in graph.users(reduced.name):
            for node in graph.users(user.name) if isinstance(user.op, Map) else (user,):
                if isinstance(node.op, Select) and not node.op.within:
                    chain = _chain(draft, node)
                    found.append((node, _scoring(draft, node, chain, None, "group")))
    return found


def _scoring(
    draft: Draft,
    node: Node,
    chain: _Chain,
    parent: Node | None,
    share: Literal["head", "group", "all"],
) -> rows.Scoring:
    """A level's score as steps."""
    score = chain.score.op
    assert isinstance(score, Score)
    assert isinstance(node.op, Select | SelectSet)
    refused = ("code_match", "pooling_error", "bias", "given", "cosine")
    assert score.form not in refused, "refused"
    weighted = score.form in ("relu_weighted", "relu_sum")
    pooled = draft.pool_of(chain.score.inputs[1]) is not None
    return rows.Scoring(
        form=score.form,
        scale=score.scale if score.scale is not None else 1.0,
        entries=draft.entries(score, score.level),
        pooled=pooled,
        normalise=chain.lse is not None,
        borrowed=_is_borrowed(draft, chain),
        share=share,
        asking=_heads_asking(draft, chain),
        reduce="sum" if weighted else chain.reduce.how if chain.reduce else None,
        map_how=_fused(chain.map),
        rows=draft.block(node),
        packed=_packs(draft, chain, parent),
        eight=all(draft.in_eight(x) for x in _scored(draft, chain)),
        powers=all(draft.in_eight(x) and draft.power(x) for x in _scored(draft, chain)),
        target=draft.entries(chain.map, node.op.level) if chain.map else Entries(size=0, stride=0),
        taps=chain.map.taps if chain.map else (),
        **_parent(draft, node, parent),
    )


def _scored(draft: Draft, chain: _Chain) -> tuple[Node, Node]:
    """The queries and keys of a score."""
    queries, keys, *_ = chain.score.inputs
    return draft.graph[queries], draft.graph[keys]


def _of_all_heads(draft: Draft, chain: _Chain) -> bool:
    """Whether a score is one dot of what all heads of a tile have, side by side."""
    return draft.tiling is not None and laid.of_all_heads(draft, draft.graph[chain.score.inputs[0]])


def _packs(draft: Draft, chain: _Chain, parent: Node | None) -> bool:
    """Whether a step's tile has all heads that score the same entries, each for itself: one read of them."""
    score = chain.score.op
    assert isinstance(score, Score)
    apart = chain.reduce is None and chain.map is None and parent is None
    several = _asking(draft, chain).group > 1
    if chain.anchors is not None:
        return several
    return draft.steps_alone and apart and score.form in ("dot", "bound") and several


def _is_borrowed(draft: Draft, chain: _Chain) -> bool:
    """Whether the log-sum-exp is that of another level's scores."""
    if chain.lse is None:
        return False
    summed = draft.graph[draft.graph[chain.lse].inputs[0]]
    return isinstance(summed.op, Score) and summed.name != chain.score.name


def _parent(draft: Draft, node: Node, parent: Node | None) -> _Parent:
    """Where a row's surviving parents are listed."""
    if parent is None:
        return {}
    assert isinstance(parent.op, Select)
    mine, theirs = draft.size(node.type.dims[2]), draft.size(parent.type.dims[2])
    if mine < theirs:
        raise PlanError(
            f"level {parent.op.level} selects per head, the level below it does not",
            span=node.span,
        )
    group = mine // theirs
    return {
        "parent_size": parent.op.size,
        "parent_width": draft.width(parent),
        "parent_heads": theirs,
        "parent_head": "head" if group == 1 else f"head // {group}",
    }


def _score_arguments(
    draft: Draft,
    chain: _Chain,
    parent: Node | None,
    context: rows.RowsContext | HalvedContext,
    scratch: str,
) -> tuple[str, ...]:
    below = (_list_of(draft, parent),) if parent else ()
    behind = (scratch, scratch.replace("scores_", "capacity_", 1))
    if isinstance(context, HalvedContext):
        read = (*draft.tensor(chain.score.inputs[0]), *draft.tensor(chain.score.inputs[1]))
        return (*read, *below, *behind, *text.SEQ, "tile_first")
    queries, keys, *others = chain.score.inputs
    weighted = bool(others) and isinstance(draft.graph[others[0]].op, Input)
    indexed = draft.graph[queries].type.dims[-1] == "Di"
    if _of_all_heads(draft, chain):
        row = str(draft.shape.kv_heads * draft.shape.qk)
        asked = (draft.tensor(queries)[0], "0", row, row)
    else:
        asked = draft.tensor(queries)
    return (
        *asked,
        *draft.tensor(keys)[: 3 if indexed else 4],
        *(_powers(draft, chain) if context.powers else ()),
        *(draft.tensor(others[0])[:3] if weighted else ()),
        *(text.strides(text.buffer(chain.lse)) if chain.lse else ()),
        *below,
        *behind,
        *draft.seq(context),
        "tile_first",
    )


def _powers(draft: Draft, chain: _Chain) -> tuple[str, ...]:
    """What the vectors of an index are times: of queries by batch and token, of keys by batch."""
    queries, keys = (draft.power(node) for node in _scored(draft, chain))
    return *text.strides(queries)[:3], *text.strides(keys)[:2]


def _fused(op: Map | None) -> Literal["overlap_sum", "sum", "max"] | None:
    """How scores are carried over where they are made."""
    how = op.how if op else None
    assert how not in ("mean", "upsample"), "refused"
    return how


class _Parent(TypedDict, total=False):
    """The fields of `rows.Scoring` that say where a row's surviving parents are listed."""

    parent_size: int
    parent_width: int
    parent_head: str
    parent_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    """The operators between a score and the selection made of it."""

    score: Node
    names: tuple[str, ...]
    lse: str | None
    reduce: Reduce | None
    map: Map | None

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.score.inputs, *((self.lse,) if self.lse else ()))

    @property
    def anchors(self) -> Anchors | None:
        """Where entries lie behind each row, if that is where they lie."""
        return self.score.op.anchors if isinstance(self.score.op, Score) else None


def part_of(graph: Graph, selection: Node) -> together.Part | None:
    """What part of the entries blocks of rows keep; None where a list has a known length, or none can be.

    Also of a graph as it is before branches of two ways are one.
    """
    graph, _ = foretold.joined(graph)
    op = selection.op
    if not isinstance(op, SelectSet) or refusals.lacking(graph, selection):
        return None
    if not op.stride and axes.tiling_of(graph) is None:  # of clusters
        return None
    own = own_entries(selection.type.dims[1], op.stride) - 1
    forced = op.first + (op.last + own if op.last else 0)
    tiling = axes.tiling_of(graph)
    above = op.rule == "threshold" and estimates.way_to(graph, selection.name) is None
    return together.Part(
        units=_units(op),
        stride=tiling.slots if tiling else op.stride,
        tiling=tiling,
        forced=forced,
        counted=op.counted,
        sides=2 if op.apart else 1,
        # masses add up to 1, or a little more as they are rounded
        most=math.floor(1 / op.value) + 1 + forced if above and op.value > 0 else None,
    )


def _units(op: SelectSet) -> int:
    """The part of the entries that a list has slots for, in units of 2^-30."""
    if op.tiers is not None and op.tiers.by == "fraction":
        return op.tiers.steps[-1][1]
    by_row = op.rule == "fraction" and not refusals.of_pairs(op)
    return together.Part.units_of(op.value if by_row else 1.0)
