"""Launches that choose by a learned bias, which no query asks for: tokens row by row, or entries."""

from __future__ import annotations

from dataclasses import replace

from hsgen import configs, refusals
from hsgen.graph import Map, Node, Pool, Score, Select
from hsgen.kernels import Means
from hsgen.plan import Buffer, Launch, Step
from hsgen.running import MeansContext, RunningContext
from hsgen.schedule import choosing, text
from hsgen.schedule.draft import Draft


def select(draft: Draft, node: Node, op: Select) -> None:
    """What each row keeps by it."""
    if refusals.by_bias(draft.graph, node) == "tokens":
        _running(draft, node, op)
    else:
        _by_means(draft, node, op)


def _running(draft: Draft, node: Node, op: Select) -> None:
    """The tokens of greatest bias up to each row: of points of a sequence first, then row by row."""
    score = draft.graph[node.inputs[0]]
    heads, level = draft.size(node.type.dims[2]), op.level
    points = RunningContext(
        name=f"points_{level}",
        how="points",
        heads=heads,
        k=op.k,
        width=op.width,
        first=op.first,
        last=op.last,
        counted=op.counted,
        causal=draft.shape.causal,
    )
    ranking = replace(points, name=f"rank_{level}", how="running")
    draft.kernel("rank", points, configs.running(points), score.name)
    draft.kernel("rank", ranking, configs.running(ranking), score.name, node.name)
    number, whole, lists = f"ends_{level}", f"all_ends_{level}", f"lists_{level}"
    bias = text.input_of(score.inputs[0])
    read = (*text.strides(bias), lists)
    chosen = text.buffer(node.name)
    dims = ("in_q.shape[0]", "in_q.shape[1]", str(heads), str(op.width))
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=score.inputs,
            makes=(node.name,),
            sizes=(
                (number, f"1 if batch.packed else batch.keys // {points.span} + 1"),
                (whole, f"{bias}.shape[1] // {points.span} + batch.sequences * {number}"),
            ),
            buffers=(
                Buffer(
                    name=lists,
                    dtype="i32",
                    dims=(whole, str(heads), str(points.room)),
                    role="list",
                ),
                Buffer(name=chosen, dtype="i32", dims=dims, role="selection"),
            ),
            launches=(
                Launch(
                    kernel=points.name,
                    grid=("batch.sequences", str(heads)),
                    arguments=(*read, number, *text.SEQ),
                ),
                Launch(
                    kernel=ranking.name,
                    grid=(text.TILES, str(heads)),
                    arguments=(*read, chosen, number, *text.SEQ),
                ),
            ),
        )
    )


def _by_means(draft: Draft, node: Node, op: Select) -> None:
    """The entries of greatest mean bias, their own or one they overlap, beside those of another choice."""
    score = refusals.score_of(draft.graph, node)
    mapped, joined = draft.graph[node.inputs[0]].op, None
    if op.joined:
        joined = draft.graph[node.inputs[1]]
    assert isinstance(score.op, Score)
    heads, level = draft.size(node.type.dims[2]), op.level
    source = draft.graph[score.inputs[0]]
    bias = source.inputs[0] if isinstance(source.op, Pool) else source.name
    of = draft.entries(score.op, score.op.level)
    means = MeansContext(name=f"means_{level}", heads=heads, entries=of)
    taps = mapped.taps if isinstance(mapped, Map) else ((0, 1),)
    ranking = replace(
        choosing.ranking(draft, node, op, short=draft.short(level)),
        means=Means(
            entries=of,
            ratio=mapped.ratio if isinstance(mapped, Map) else 1,
            first_tap=taps[0][0],
            end_tap=taps[-1][0] + 1,
        ),
        joined=draft.width(joined) if joined else 0,
        joined_group=heads // draft.size(joined.type.dims[2]) if joined else 1,
    )
    draft.kernel("rank", means, configs.means(), source.name, score.name)
    ranks = configs.rank(0, op.stride, 1, grouped=False)
    ranks = replace(ranks, constexprs=(("BLOCK_T", 1), *ranks.constexprs))
    draft.kernel("rank", ranking, ranks, *dict.fromkeys((score.name, node.inputs[0], node.name)))
    length, entries, made = f"length_{level}", f"entries_{level}", f"means_of_{level}"
    x, chosen = text.input_of(bias), text.buffer(node.name)
    dims = ("in_q.shape[0]", "in_q.shape[1]", str(heads), str(op.width))
    tiles, of_means = f"tiles_{level}", f"tiles_of_means_{level}"
    block_t, block_e = (
        f'config["{name}"]["{of_tile}"]'
        for name, of_tile in ((ranking.name, "BLOCK_T"), (means.name, "BLOCK_E"))
    )
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=(bias, *((joined.name,) if joined else ())),
            makes=(node.name,),
            sizes=(
                (length, f"1 if batch.packed else batch.keys // {of.stride} + 1"),
                (entries, f"{x}.shape[1] // {of.stride} + batch.sequences * {length}"),
                (of_means, f"{entries} // {block_e} + batch.sequences"),
                (tiles, text.tiles_of(ranking.name)),
            ),
            buffers=(
                Buffer(name=made, dtype="f32", dims=(str(heads), entries), role="level"),
                Buffer(name=chosen, dtype="i32", dims=dims, role="selection"),
            ),
            launches=(
                Launch(
                    kernel=means.name,
                    grid=(of_means, str(heads)),
                    arguments=(*text.strides(x), made, length, entries, *text.SEQ),
                ),
                Launch(
                    kernel=ranking.name,
                    grid=(f"{tiles} * ({block_t} // {{BLOCK_R}})", str(heads)),
                    arguments=(
                        made,
                        chosen,
                        *((text.buffer(joined.name),) if joined else ()),
                        *text.SEQ,
                        length,
                        entries,
                    ),
                ),
            ),
        )
    )
