"""Launches of heads that choose in one of two ways: which one each takes, what it keeps, and attention."""

from __future__ import annotations

from dataclasses import replace

from hsgen import configs, foretold, together
from hsgen.foretold import EitherContext, Foretold, Kept, WaysContext
from hsgen.graph import Attend, Node, Route, Score, SelectSet
from hsgen.kernels import RankContext
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import choosing, selected, slashing, text
from hsgen.schedule.draft import Draft

MASSES, TOLD = "masses_{}", "told_{}"
CAPACITY = "capacity_ways"


def launched(draft: Draft, node: Node) -> bool:
    """Whether an operator is done here, as part of a whole: a route's launches are those of all before it."""
    found = foretold.foretold(draft.graph)
    if found is None or node.name not in found.names:
        return False
    match node.op:
        case Route():
            _choose(draft, found)
        case Attend() as op:
            _attend(draft, found, op)
        case _:
            pass
    return True


def alone(draft: Draft) -> str:
    """A level that all rows have one list of, so that no caller's lists of rows are attended."""
    found = foretold.foretold(draft.graph)
    return _op(found.columns.selection).level if found else ""


def _op(selection: Node) -> SelectSet:
    assert isinstance(selection.op, SelectSet)
    return selection.op


def _choose(draft: Draft, found: Foretold) -> None:
    """Masses of keys and diagonals, how many have enough of them, the ways, and the best of their blocks."""
    both = (found.columns, found.diagonals)
    weighed = [slashing.weigh(draft, x.chain, _op(x.chain.selection)) for x in both]
    tokens = [_tokens(draft, x, y) for x, y in zip(both, weighed, strict=True)]
    ways = _ways(draft, found)
    blocks = [_blocks(draft, x) for x in both]
    heads, way = ("batch.sequences", str(draft.shape.query_heads)), text.buffer(found.route.name)
    estimates = f"estimates_{ways.name}"
    keys = found.estimate.keys.name
    levels = [_op(x.selection).level for x in both]
    masses, told = ([name.format(level) for level in levels] for name in (MASSES, TOLD))
    scratch = [
        Buffer(name=name, dtype="f32", dims=(*heads, CAPACITY), role="scratch")
        for name in (estimates, *masses)
    ]
    counted = [(y.buffer, _counts(x.chain.selection)) for x, y in zip(both, weighed, strict=True)]
    arguments = (
        *draft.tensor("q"),
        *draft.tensor(keys),
        *(name for pair in counted for name in pair),
        weighed[0].capacity,
        estimates,
        *masses,
        CAPACITY,
        *told,
        way,
        *text.SEQ,
    )
    lists = [x for each in both for x in (each.chain.selection, each.selection)]
    draft.steps.append(
        Step(
            title=f"choose: {', '.join(_op(x).level for x in lists)}",
            needs=("q", *found.estimate.keys.inputs, keys),
            makes=(found.route.name, *(choosing.chosen_of(x) for x in lists)),
            sizes=(
                *(size for each in weighed for size in each.sizes),
                *(size for x in lists for size in _part(draft, x).sizes(_op(x).level)),
                (CAPACITY, f"batch.keys // {found.size} + 1"),
            ),
            buffers=(
                *(buffer for each in weighed for buffer in each.buffers),
                *scratch,
                *(Buffer(name=x, dtype="i32", dims=heads, role="scratch") for x in told),
                *(buffer for x in lists for buffer in _lists(draft, x)),
                Buffer(name=way, dtype="i32", dims=heads, role="list"),
            ),
            launches=(
                *(
                    launch
                    for each, rank in zip(weighed, tokens, strict=True)
                    for launch in (*each.launches, rank)
                ),
                Launch(kernel=ways.name, grid=(heads[1], heads[0]), arguments=arguments),
                *blocks,
            ),
        )
    )
    for x in lists:
        choosing.spread(draft, x, _op(x), draft.shape.query_heads, 0)


def _part(draft: Draft, selection: Node) -> together.Part:
    part = choosing.part_of(draft.graph, selection)
    assert part is not None, "refused"
    return part


def _counts(selection: Node) -> str:
    return slashing.COUNTS.format(_op(selection).level)


def _lists(draft: Draft, selection: Node) -> tuple[Buffer, Buffer]:
    """A list of each head, and how long it is."""
    each = ("batch.sequences", str(draft.shape.query_heads))
    made = text.buffer(choosing.chosen_of(selection))
    return (
        Buffer(name=_counts(selection), dtype="i32", dims=(*each, "2"), role="list"),
        Buffer(name=made, dtype="i32", dims=(*each, draft.slots(selection)), role="list"),
    )


def _tokens(draft: Draft, kept: Kept, weights: slashing.Weights) -> Launch:
    """The keys, or diagonals, that have enough of the mass."""
    node = kept.chain.selection
    ranking = choosing.ranking(draft, node, _op(node), short=True)
    return _ranked(draft, node, ranking, weights.buffer, weights.capacity)


def _blocks(draft: Draft, kept: Kept) -> Launch:
    """The best blocks of either, of heads that are told to keep any."""
    node, level = kept.selection, _op(kept.selection).level
    ranking = choosing.ranking(draft, node, _op(node), short=True)
    ranking = replace(ranking, budget=False, told="head")
    return _ranked(draft, node, ranking, MASSES.format(level), CAPACITY, TOLD.format(level))


def _ranked(
    draft: Draft, node: Node, ranking: RankContext, scores: str, capacity: str, *told: str
) -> Launch:
    """One row a sequence and head."""
    ranking = replace(ranking, single=True, rows=1)
    config = configs.rank_alone(by_mass=bool(ranking.mass))
    draft.kernel("rank", ranking, config, node.name)
    made = text.buffer(choosing.chosen_of(node))
    listed = (scores, made, _counts(node), *told)
    return Launch(
        kernel=ranking.name,
        grid=("batch.sequences", str(ranking.heads)),
        arguments=(*listed, *text.SEQ, "0", capacity, draft.slots(node)),
    )


def _ways(draft: Draft, found: Foretold) -> WaysContext:
    """What says which way each head takes."""
    route, score, estimate = found.route.op, found.estimate.score.op, found.estimate
    assert isinstance(route, Route)
    assert isinstance(score, Score)
    assert route.divergence is not None, "computed"
    context = WaysContext(
        name="ways",
        heads=draft.shape.query_heads,
        group=draft.shape.group,
        head_dim=draft.shape.qk,
        last=found.columns.chain.last,
        size=found.size,
        scale=score.scale or 1.0,
        threshold=route.divergence,
        below=0,
        above=1,
        pooled=found.way,
    )
    sums = (found.columns.mapped.name, found.diagonals.mapped.name)
    made = dict.fromkeys((*estimate.names, found.mapped.name, *sums, found.route.name))
    draft.kernel("maps", context, configs.ways(context), *made)
    return context


def chosen_of(found: Foretold) -> tuple[str, ...]:
    """What heads chose on either way: blocks of rows, the way, and all rows of a head."""
    blocks, *kept = _lists_of(found)
    return choosing.chosen_of(blocks), found.route.name, *(choosing.chosen_of(x) for x in kept)


def lists_of(found: Foretold) -> tuple[str, ...]:
    """The same as kernels read it: lists of blocks of rows, those of heads and how long they are, the way."""
    blocks, *kept = _lists_of(found)
    lists = (y for x in kept for y in (text.buffer(choosing.chosen_of(x)), _counts(x)))
    return text.buffer(choosing.chosen_of(blocks)), *lists, text.buffer(found.route.name)


def _lists_of(found: Foretold) -> tuple[Node, Node, Node]:
    return found.blocks, found.columns.selection, found.diagonals.selection


def _attend(draft: Draft, found: Foretold, op: Attend) -> None:
    """Blocks of either way: a tile's are listed by what its head chose."""
    node, name = found.attend, op.branch
    branch = replace(
        selected.branch_of(draft, node, op),
        needs=(*node.inputs[:3], *chosen_of(found)[1:]),
    )

    (_, _, attends), (own, _) = together.plan(
        draft.shape,
        branch,
        lambda context: draft.tiles(context, limit=128, most=branch.block, block=op.size),
    )
    either = EitherContext(
        name=f"index_{name}", heads=draft.shape.query_heads, rows=branch.block, way=found.way
    )
    draft.kernel("index", either, configs.listing(), node.name, follows=attends.name)
    listing, attending = own.launches
    arguments = (*lists_of(found), *listing.arguments[1:])
    launches = (replace(listing, arguments=arguments), attending)
    draft.add((attends,), (replace(own, of=None, launches=launches),))
