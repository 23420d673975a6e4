"""Launches of tokens that heads keep: masses, how many and which stay, the order of rows, and attention."""

from __future__ import annotations

from dataclasses import replace

from hsgen import configs, keeping, together
from hsgen.graph import Attend, Node, ReduceRows, Score, SelectSet
from hsgen.keeping import SiftContext, Way
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import choosing, selected, sorted_keys, text
from hsgen.schedule.draft import Draft
from hsgen.sorting import PART, SortingContext

BLOCK = 64  # rows of a tile, of lists that a caller brings


def choose(draft: Draft, node: Node, op: SelectSet) -> None:
    """Smooth the masses of all heads, or of each, and keep the best tokens of a sequence."""
    way = _way(draft, node)
    _weigh(draft, way)
    told = op.rule == "budget_from"
    level, heads = op.level, draft.size(node.type.dims[2])
    smooth = replace(
        _context(draft, way, f"smooth_{level}"),
        how="around",
        width=way.width,
        together=not told,
    )
    draft.kernel("sorting", smooth, sorted_keys.config(smooth, draft.dtype), *_own(way))
    ranking = replace(
        choosing.ranking(draft, node, op, short=True),
        single=True,
        rows=1,
        counted=op.counted,
        budget=False,
        told="all" if told else "",
    )
    draft.kernel("rank", ranking, configs.rank_alone(by_mass=not told), node.name)
    part, made, slots = (
        choosing.part_of(draft.graph, node),
        choosing.chosen_of(node),
        draft.slots(node),
    )
    assert part is not None, "refused"
    keys, scratch, many = f"keys_{level}", f"scores_{level}", counts(level)
    each, weights = ("batch.sequences", str(heads)), _weights(draft, way)
    source = op.budget_from
    others = (choosing.chosen_of(draft.graph[node.inputs[1]]),) if told else ()
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(_masses(draft, way), *others),
            makes=(made,),
            sizes=(*part.sizes(level), (keys, "max(1, batch.keys)")),
            buffers=(
                Buffer(name=scratch, dtype="f32", dims=(*each, keys), role="scratch"),
                Buffer(name=many, dtype="i32", dims=(*each, "2"), role="list"),
                Buffer(name=text.buffer(made), dtype="i32", dims=(*each, slots), role="list"),
            ),
            launches=(
                Launch(
                    kernel=smooth.name,
                    grid=(f"{keys} // {{BLOCK_N}} + 1", str(heads), "batch.sequences"),
                    arguments=(weights, scratch, keys, *text.SEQ),
                ),
                Launch(
                    kernel=ranking.name,
                    grid=each,
                    arguments=(
                        scratch,
                        text.buffer(made),
                        many,
                        *((counts(source),) if source else ()),
                        *text.SEQ,
                        "0",
                        keys,
                        slots,
                    ),
                ),
            ),
        )
    )
    choosing.spread(draft, node, op, heads, 0)


def _way(draft: Draft, node: Node) -> Way:
    way = keeping.way_to(draft.graph, node.inputs[0])
    assert way is not None, "a choice of masses that last rows give"
    return way


def _own(way: Way) -> tuple[str, ...]:
    """The nodes behind the masses of each head."""
    after = (way.reduced, way.together, way.mapped) if way.reduced else (way.mapped,)
    return tuple(node.name for node in after if node)


def _alike(draft: Draft, way: Way) -> tuple[Way, ...]:
    """The ways whose masses of each head are the same: they are made once."""
    names = (node.name for node in draft.graph.nodes() if isinstance(node.op, ReduceRows))
    found = (keeping.way_to(draft.graph, name) for name in names)
    return tuple(x for x in found if x and x.weighing == way.weighing)


def _masses(draft: Draft, way: Way) -> str:
    """What stands for the masses of each head."""
    return f"{_alike(draft, way)[0].normalised.name}.last"


def _weights(draft: Draft, way: Way) -> str:
    return text.buffer(_masses(draft, way))


def counts(level: str) -> str:
    """How many tokens each head keeps."""
    return f"counts_{level}"


def _context(draft: Draft, way: Way, name: str) -> SortingContext:
    assert isinstance(way.together.op, ReduceRows)
    shape = draft.shape
    return SortingContext(
        name=name,
        how="totals",
        heads=shape.query_heads,
        group=1,
        head_dim=shape.qk,
        segment=0,
        last=way.last,
        shared=shape.group,
        causal=shape.causal,
        mean=way.together.op.how == "mean",
        scale=way.scale,
        precision=shape.precision,
    )


def _weigh(draft: Draft, way: Way) -> None:
    """What the last rows give each token, head by head."""
    made = _masses(draft, way)
    if any(made in step.makes for step in draft.steps):
        return
    assert isinstance(way.score.op, Score)
    level = way.score.op.level
    totals = _context(draft, way, f"totals_{level}")
    masses = replace(totals, name=f"weigh_{level}", how="masses")
    ways = _alike(draft, way)
    summed = (name for x in ways for name in (x.score.name, x.lse.name))
    weighed = (x.normalised.name for x in ways)
    own = (x.together.name for x in ways if not x.reduced)
    draft.kernel("sorting", totals, sorted_keys.config(totals, draft.dtype), *summed)
    draft.kernel("sorting", masses, sorted_keys.config(masses, draft.dtype), *weighed, *own)
    keys, parts, sums = f"keys_{level}", f"parts_{level}", f"sums_{level}"
    step, tiles, heads = f"step_{level}", f"tiles_{level}", str(draft.shape.query_heads)
    queries, source = (draft.tensor(name) for name in way.score.inputs)
    dims = ("batch.sequences", heads)
    draft.steps.append(
        Step(
            title=f"masses: {level}",
            needs=way.score.inputs,
            makes=(made,),
            sizes=(
                (keys, "max(1, batch.keys)"),
                (parts, f"({keys} + {PART - 1}) // {PART}"),
                (step, f'config["{totals.name}"]["BLOCK_T"]'),
                (tiles, f"({totals.judges} + {step} - 1) // {step}"),
            ),
            buffers=(
                Buffer(
                    name=sums,
                    dtype="f32",
                    dims=(*dims, parts, "2", str(totals.judges)),
                    role="scratch",
                ),
                Buffer(name=text.buffer(made), dtype="f32", dims=(*dims, keys), role="list"),
            ),
            launches=(
                Launch(
                    kernel=totals.name,
                    grid=(f"{parts} * {tiles}", heads, "batch.sequences"),
                    arguments=(*queries, *source, sums, parts, *text.SEQ),
                ),
                Launch(
                    kernel=masses.name,
                    grid=(f"{keys} // {{BLOCK_N}} + 1", heads, "batch.sequences"),
                    arguments=(
                        *queries,
                        *source,
                        sums,
                        parts,
                        text.buffer(made),
                        keys,
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )


def attend(draft: Draft, node: Node, op: Attend) -> None:
    """Kept rows attend to kept tokens; or rows to what each chose, with its own token or not at all."""
    selection, shape, name = draft.graph[node.inputs[3]], draft.shape, op.branch
    assert isinstance(selection.op, SelectSet)
    made, level, heads = choosing.chosen_of(selection), selection.op.level, str(shape.query_heads)
    context = keeping.attend(shape, name=f"attend_{name}", scale=op.scale or 1.0)
    context = selected.as_branch(draft, context, node, op)
    sift = SiftContext(name=f"sift_{name}", heads=shape.query_heads)
    few = Config(constexprs=(("BLOCK_T", 256),), num_warps=4, num_stages=1)
    draft.kernel("index", sift, few, node.name)
    draft.attend(context, draft.row_tiles.of_tokens(context), *draft.makes(node))
    stay, order = f"stay_{name}", f"rows_{name}"
    row_order = (order, f"0 if batch.packed else {order}.stride(0)", f"{order}.stride(1)")
    lists, many, slots = text.buffer(made), counts(level), draft.slots(selection)
    draft.steps.append(
        Step(
            title=f"attend: {name}",
            needs=draft.needs(node, *node.inputs[:3], *node.inputs[4:], made),
            makes=draft.makes(node),
            of="own",
            sizes=(),
            buffers=(
                Buffer(name=stay, dtype="i32", dims=("batch.sequences", heads, "2"), role="list"),
                Buffer(
                    name=order,
                    dtype="i32",
                    dims=("in_q.shape[0]", heads, "in_q.shape[1]"),
                    role="list",
                ),
                *draft.output_buffers(node),
            ),
            launches=(
                Launch(
                    kernel=sift.name,
                    grid=(text.tiles(), heads),
                    arguments=(lists, many, stay, slots, *row_order, *text.SEQ),
                ),
                Launch(
                    kernel=context.name,
                    grid=(text.tiles(), heads),
                    arguments=(
                        *draft.tensors(node, op),
                        lists,
                        *(() if shape.causal else (many,)),
                        stay,
                        slots,
                        *row_order,
                        *draft.outputs(node),
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )
    branch = replace(
        selected.branch_of(draft, node, op), name=f"rows_{name}", lists="", block=BLOCK, width=""
    )
    kernels, steps = together.plan(
        shape, branch, lambda x: draft.row_tiles.of_tokens(x, most=BLOCK), own=True
    )
    draft.add(kernels, tuple(replace(step, of="given") for step in steps))
