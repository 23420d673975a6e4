"""Launches of columns and diagonals: what the last rows give them, the best of each, and attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsgen import rows, slashes
from hsgen.configs import DType
from hsgen.graph import Attend, Node, ReduceRows, Score, Select, SelectSet
from hsgen.kernels import MOST_HELD
from hsgen.maps import LastContext
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import choosing, selected, text
from hsgen.schedule.draft import Draft

COUNTS = "counts_{}"


def launched(draft: Draft, node: Node) -> bool:
    """Whether an operator is done here, as part of a whole; if it ends one, its launches are planned."""
    if not slashes.reached(draft.graph, node):
        return False
    match node.op:
        case Select() as op:
            chain = slashes.chain_of(draft.graph, node.name)
            assert chain is not None, "reached"
            _choose(draft, chain, op)
        case Attend() as op:
            _attend(draft, node, op)
        case _:
            pass  # fused into the launches of its selection
    return True


def alone(draft: Draft) -> str:
    """A level that all rows have one list of: no lists of rows that a caller brings are attended in its
    place, so that what would attend these is left out.
    """
    nodes = (x for node in draft.graph.nodes() for x in slashes.lists_of(draft.graph, node) if x)
    first = next(nodes, None)
    if first is None:
        return ""
    assert isinstance(first.op, Select)
    steps = [replace(x, of=None) if x.of == "own" else x for x in draft.steps if x.of != "given"]
    launched = {launch.kernel for step in steps for launch in step.launches}
    draft.steps = steps
    draft.kernels = [kernel for kernel in draft.kernels if kernel.name in launched]
    return first.op.level


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What makes the masses that last rows give tokens, or diagonals, `buffer`: rows of `capacity`."""

    buffer: str
    capacity: str
    needs: tuple[str, ...]
    sizes: tuple[tuple[str, str], ...]
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]


def weigh(draft: Draft, chain: slashes.Chain, op: Select | SelectSet) -> Weights:
    """Softmaxes of the last rows, and their sums over rows, key by key or diagonal by diagonal."""
    level, score, together = op.level, chain.score, chain.together
    totals, sums = _contexts(draft, chain, op)
    draft.kernel("maps", totals, _config(totals, draft.dtype), score.name, chain.lse.name)
    made_there = (chain.normalised.name, together.name)
    draft.kernel("maps", sums, _config(sums, draft.dtype), *made_there)
    heads, sequences = str(draft.shape.query_heads), "batch.sequences"
    parts, capacity = f"softmax_parts_{level}", f"capacity_{level}"
    asked = (*draft.tensor("q"), *draft.tensor(score.inputs[1]))
    held, weights, each = f"sums_{level}", f"scores_{level}", (sequences, heads)
    return Weights(
        buffer=weights,
        capacity=capacity,
        needs=score.inputs,
        sizes=((capacity, "batch.keys + 1"), (parts, f"batch.keys // {totals.part} + 1")),
        buffers=(
            Buffer(
                name=held,
                dtype="f32",
                dims=(*each, parts, "2", str(totals.per_row)),
                role="scratch",
            ),
            Buffer(name=weights, dtype="f32", dims=(*each, capacity), role="scratch"),
        ),
        launches=(
            Launch(
                kernel=totals.name,
                grid=(f"{parts} * {totals.tiles}" if totals.tiles > 1 else parts, heads, sequences),
                arguments=(*asked, held, parts, *text.SEQ),
            ),
            Launch(
                kernel=sums.name,
                grid=(f"{capacity} // {{BLOCK_N}} + 1", heads, sequences),
                arguments=(*asked, held, parts, weights, capacity, *text.SEQ),
            ),
        ),
    )


def _choose(draft: Draft, chain: slashes.Chain, op: Select) -> None:
    """Masses of tokens, or diagonals, and the best."""
    node, level = chain.selection, op.level
    weights = weigh(draft, chain, op)
    ranking = replace(choosing.ranking(draft, node, op, short=True), single=True, rows=1)
    values = (("BLOCK_T", 1), ("BLOCK_R", 1), ("BLOCK_N", MOST_HELD))
    config = Config(constexprs=values, num_warps=16, num_stages=1)  # few rows, each of all keys
    draft.kernel("rank", ranking, config, node.name)
    made, ways = choosing.chosen_of(node), choosing.way_of(node)
    each, counts = ("batch.sequences", str(ranking.heads)), COUNTS.format(level)
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(*weights.needs, *ways),
            makes=(made,),
            sizes=weights.sizes,
            buffers=(
                *weights.buffers,
                Buffer(name=counts, dtype="i32", dims=(*each, "2"), role="list"),
                Buffer(
                    name=text.buffer(made), dtype="i32", dims=(*each, str(op.width)), role="list"
                ),
            ),
            launches=(
                *weights.launches,
                Launch(
                    kernel=ranking.name,
                    grid=each,
                    arguments=(
                        weights.buffer,
                        text.buffer(made),
                        counts,
                        *(text.input_of(name) for name in ways),
                        *text.SEQ,
                        "0",
                        weights.capacity,
                    ),
                ),
            ),
        )
    )
    choosing.spread(draft, node, op, ranking.heads, 0)


def _contexts(
    draft: Draft, chain: slashes.Chain, op: Select | SelectSet
) -> tuple[LastContext, LastContext]:
    score, together = chain.score.op, chain.together.op
    assert isinstance(score, Score)
    assert isinstance(together, ReduceRows)
    totals = LastContext(
        name=f"totals_{op.level}",
        how="totals",
        heads=draft.shape.query_heads,
        group=draft.shape.group,
        head_dim=draft.shape.qk,
        last=chain.last,
        slanted=bool(op.diagonal),
        mean=together.how == "mean",
        scale=score.scale or 1.0,
        precision=draft.shape.precision,
    )
    how = "diagonals" if op.diagonal else "columns"
    return totals, replace(totals, name=f"weigh_{op.level}", how=how)


def _config(context: LastContext, dtype: DType) -> Config:
    """Keys of a tile of products; of diagonals twice as many, since those of a row begin one further on."""
    wide = 64 if dtype == "fp32" or context.how == "diagonals" else 128
    wide = max(wide, context.least)
    stages = 3 if context.how == "totals" and dtype != "fp32" else 1
    warps = 8 if context.per_tile * wide > 64 * 128 or context.tiles > 1 else 4
    return Config(constexprs=(("BLOCK_N", wide),), num_warps=warps, num_stages=stages)


def _attend(draft: Draft, node: Node, op: Attend) -> None:
    """What lists of diagonals say of steps of keys, and attention over these and over columns."""
    columns, diagonals = slashes.lists_of(draft.graph, node)
    name = f"attend_{op.branch}"
    turn = draft.turn(node)
    context = slashes.attend(
        draft.shape,
        name=name,
        scale=op.scale or 1.0,
        columns=draft.width(columns) if columns else 0,
        diagonals=draft.width(diagonals) if diagonals else 0,
        later=isinstance(turn, rows.Joined) and not turn.first,
    )
    context = selected.as_branch(draft, context, node, op)
    config = draft.row_tiles.attend(context, limit=128, block=slashes.STEP)
    draft.kernel("rows", context, config, *draft.makes(node))
    heads = str(draft.shape.query_heads)
    read: list[str] = []
    lists: list[str] = []
    sizes: list[tuple[str, str]] = []
    buffers: list[Buffer] = []
    launches: list[Launch] = []
    if columns is not None:
        assert isinstance(columns.op, Select)
        made = choosing.chosen_of(columns)
        read.append(made)
        lists += (text.buffer(made), COUNTS.format(columns.op.level))
    if diagonals is not None:
        assert isinstance(diagonals.op, Select)
        made = choosing.chosen_of(diagonals)
        read.append(made)
        slants = slashes.SlantsContext(
            name=f"index_{op.branch}",
            heads=draft.shape.query_heads,
            width=draft.width(diagonals),
            columns=draft.width(columns) if columns else 0,
        )
        index = Config(constexprs=(("BLOCK_K", 64),), num_warps=8, num_stages=1)
        draft.kernel("index", slants, index, node.name, follows=name)
        words, capacity = f"words_{op.branch}", f"steps_{op.branch}"
        bits, steps, before = (f"{of}_{op.branch}" for of in ("bits", "list", "before"))
        tokens, step = (f'config["{name}"]["{of}"]' for of in ("BLOCK_T", "BLOCK_N"))
        sizes += [
            (words, "batch.keys // 64 + 1"),
            (f"rows_{op.branch}", tokens),
            (f"keys_{op.branch}", step),
            (capacity, f"(batch.keys + rows_{op.branch}) // keys_{op.branch} + 2"),
        ]
        each = ("batch.sequences", heads)
        buffers += [
            Buffer(name=bits, dtype="i64", dims=(*each, words), role="list"),
            Buffer(name=steps, dtype="i32", dims=(*each, "2", capacity), role="list"),
            Buffer(name=before, dtype="i32", dims=(*each, "2", f"{capacity} + 1"), role="list"),
        ]
        slanted = (bits, words, steps, before, capacity)
        of_columns = tuple(lists)
        if columns is not None:
            taken = f"column_bits_{op.branch}"
            buffers.append(Buffer(name=taken, dtype="i64", dims=(*each, words), role="list"))
            slanted = (taken, *slanted)
        lists += slanted
        launches.append(
            Launch(
                kernel=slants.name,
                grid=(heads, "batch.sequences"),
                arguments=(
                    text.buffer(made),
                    COUNTS.format(diagonals.op.level),
                    *of_columns,
                    *slanted,
                    *text.SEQ,
                ),
            )
        )
    launches.append(
        Launch(
            kernel=name,
            grid=text.grid(draft.shape, context, text.TILES),
            arguments=(
                *draft.tensors(node, op),
                *lists,
                *draft.outputs(node),
                *draft.seq(context),
            ),
        )
    )
    draft.steps.append(
        Step(
            title=f"attend: {op.branch}",
            needs=draft.needs(node, *node.inputs[:3], *read),
            makes=draft.makes(node),
            sizes=tuple(sizes),
            buffers=(*buffers, *draft.output_buffers(node)),
            launches=tuple(launches),
        )
    )
