"""Scores of a level, computed or mapped."""

from __future__ import annotations

from typing import Literal

from hsgen import spec as language
from hsgen.errors import PlanError, Span
from hsgen.graph import (
    Anchors,
    Codes,
    Halves,
    LogSumExp,
    Map,
    Node,
    Normalise,
    Reduce,
    ReduceRows,
    Round,
    Score,
)
from hsgen.planner.builder import Builder, some
from hsgen.planner.calls import narrowed
from hsgen.planner.entries import (
    before_of,
    diagonal,
    parts_of,
    pooled,
    score_bias,
    score_given,
    score_keys,
    score_query,
)
from hsgen.planner.orders import axis_tiles, cut_of, lies_in, order


def plan_score(builder: Builder, level: language.Level, parent: Node | None) -> Node:
    """form, scale -> normalise -> reduce over heads."""
    score = level.score
    assert score.form is not None
    moved = "permute" if level.permute is not None else "partition"
    if score.by_bias and (moved == "permute" or isinstance(level.partition, language.Ragged)):
        keys = "permuted keys" if moved == "permute" else "runs"
        raise PlanError(
            f"level '{level.name}' scores a bias of {keys}: the graph has no operator yet",
            span=builder.place(level, moved),
            help="remove 'permute'" if moved == "permute" else "write 'partition: {blocks: 64}'",
        )
    cut, held = lies_in(builder, level)
    op = Score(
        level=level.name,
        form=score.form,
        scale=_scale(builder, score),
        size=level.partition.size,
        stride=level.partition.stride,
        within=level.within,
        grouped=True if score.sums_index and score.share == "group" else None,
        codes=_codes(score.codes) if score.codes else None,
        biased=True if score.bias == "learned" else None,
        among=True if (among := narrowed(builder, level)) else None,
        rows=level.query.rows if level.query else None,
        parts=parts_of(level),
        counted=True if score.bias == "log_count" else None,
        cut=cut or (cut_of(level) if _asks_tokens(score) else None),
        anchors=anchors_of(level),
        halves=_halves(builder, level),
        diagonal=diagonal(level),
    )
    queries = [] if score.form == "bias" else [score_query(builder, level)]
    operands = (
        [score_given(builder, level)]
        if score.form == "given"
        else [*queries, score_keys(builder, level)]
    )
    if score.by_index:
        operands = [_rounded(builder, operand) for operand in operands]
    elif score.dtype is not None:
        operands = [_rounded_to(builder, level, operand) for operand in operands]
    if score.form == "relu_weighted":
        operands.append(builder.input("w_index", "index_weights", "B", "T", "Hi"))
    if score.codes is not None:
        operands.append(_codebook(builder, level, score.codes))
    if score.bias == "learned":
        operands.append(score_bias(builder, level))
    if score.form == "pooling_error":
        operands += _pooled_from(builder, level)
    operands += order(builder, level) if op.cut and not held else ()
    at = builder.place(level, "score", "form")
    last = (*held, *some(parent), *some(among))
    made = builder.add(f"{level.name}.score", op, *operands, *last, at=at)
    if score.normalise is not None:
        made = _normalised(builder, level, made)
    if score.share != "head" and score.reduce is not None:  # else they are one score already
        at = builder.place(level, "score", "share")
        reduce = Reduce(share=score.share, how=score.reduce)
        made = builder.add(f"{level.name}.reduced", reduce, made, at=at)
    return _together(builder, level, made)


def _normalised(builder: Builder, level: language.Level, made: Node) -> Node:
    """Scores as masses, by a sum of their own or another's, or by the greatest of them."""
    at = builder.place(level, "score", "normalise")
    if level.score.normalise == "max":
        return builder.add(f"{level.name}.peak", Normalise(level=level.name, by="max"), made, at=at)
    lse = _log_sum_exp(builder, level, at)
    return builder.add(f"{level.name}.mass", Normalise(level=level.name), made, lse, at=at)


def _log_sum_exp(builder: Builder, level: language.Level, at: Span | None) -> Node:
    """What a level's scores are normalised by: the sum of a level's, its own, or of a branch."""
    source = builder.spec.summed(level) or level
    if isinstance(source, language.Attend):
        return builder.nodes[f"{source.name}.lse"]
    summed = builder.nodes[f"{source.name}.score"]
    return builder.add(f"{source.name}.score_lse", LogSumExp(), summed, at=at)


def _together(builder: Builder, level: language.Level, made: Node) -> Node:
    """Scores of rows that choose together, where each of them scores; halves they search as one."""
    op = _reduced_rows(builder, level)
    if op is None or isinstance(level.partition, language.Halving):
        return made
    at = builder.place(level, "query", "reduce")
    return builder.add(f"{level.name}.together", op, made, at=at)


def _reduced_rows(builder: Builder, level: language.Level) -> ReduceRows | None:
    query = level.query
    if query is None or query.reduce is None:
        return None
    at = builder.place(level, "query", "reduce")
    return ReduceRows(
        level=level.name,
        how=query.reduce,
        block=query.block,
        last=query.last,
        tiles=axis_tiles(builder, query.tile, at) if query.tile else None,
    )


def _rounded(builder: Builder, vectors: Node) -> Node:
    """Vectors of the index as they are kept."""
    dtype = builder.spec.index.dtype if builder.spec.index else "input"
    if dtype == "input":
        return vectors
    at = builder.spec.span("index", "dtype")
    return builder.add(f"{vectors.name}.rounded", Round(dtype=dtype), vectors, at=at)


def _rounded_to(builder: Builder, level: language.Level, vectors: Node) -> Node:
    """Vectors as a level scores them; others may round the same ones otherwise."""
    dtype = level.score.dtype
    if dtype is None or dtype == "input":
        return vectors
    at = builder.place(level, "score", "dtype")
    return builder.add(f"{vectors.name}.{dtype}", Round(dtype=dtype), vectors, at=at)


def _codes(codes: language.Codes) -> Codes:
    return Codes(words=codes.words, dim=codes.dim, distance=codes.distance, buckets=codes.buckets)


def _codebook(builder: Builder, level: language.Level, codes: language.Codes) -> Node:
    width = builder.spec.head_dim
    if width is None:
        raise PlanError(
            f"level '{level.name}' compares codes: how many depends on head_dim, which is not known",
            span=builder.place(level, "score", "codes"),
            help="give `head_dim` in the spec or to Spec.bind",
        )
    dims = (str(width.qk // codes.dim), str(codes.words), str(codes.dim))
    return builder.input(f"{level.name}_codebook", "codebook", *dims)


def _pooled_from(builder: Builder, level: language.Level) -> list[Node]:
    """The keys that were pooled, and values and what they were pooled into."""
    found = [builder.keys(level.kv)]
    if level.pool is not None and level.pool.values is not None:
        found += [pooled(builder, level, "value"), builder.values(level.kv)]
    return found


def _scale(builder: Builder, score: language.Score) -> float | None:
    match score.scale:
        case "none":
            return 1.0
        case None:
            plain = score.by_index or score.codes or score.form in ("bias", "given", "cosine")
            return 1.0 if plain else builder.attention_scale()
        case _:
            return float(score.scale)


def plan_map(builder: Builder, level: language.Level, source: language.Level) -> Node:
    """The scores of another level, after its own steps, carried over."""
    how, target = level.score.map, level.partition
    assert how is not None
    cut = "runs" if isinstance(source.partition, language.Ragged) else None
    coarse, fine = source.partition.stride, target.stride
    op = Map(
        level=level.name,
        how=_how(how),
        size=target.size,
        stride=target.stride,
        ratio=(1 if cut else coarse // fine) if how == "upsample" else fine // coarse,
        taps=_around_taps(level.score) if how == "around" else _TAPS[how](source.partition, target),
        before=before_of(level),
        cut=cut,
    )
    operands = [builder.scores[source.name], *((builder.assigned[source.name],) if cut else ())]
    at = builder.place(level, "score", "map")
    made = builder.add(f"{level.name}.mapped", op, *operands, at=at)
    return _together(builder, level, made)


def _how(
    how: language.MapHow,
) -> Literal["overlap_sum", "sum", "max", "mean", "upsample"]:
    match how:
        case "overlap_max":
            return "max"
        case "avg_pool":
            return "mean"
        case "around":
            return "sum"
        case _:
            return how


def _asks_tokens(score: language.Score) -> bool:
    """Whether a score asks which tokens an entry has."""
    return score.bias == "log_count" or score.form == "pooling_error"


def _halves(builder: Builder, level: language.Level) -> Halves | None:
    if not isinstance(level.partition, language.Halving):
        return None
    return Halves(until=level.partition.until, rows=_reduced_rows(builder, level))


def anchors_of(level: language.Level) -> Anchors | None:
    stripes = level.partition
    if not isinstance(stripes, language.Stripes):
        return None
    return Anchors(power=stripes.power, first=stripes.first)


def _overlap_taps(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """NSA eq. 9: how many pairs of a stride of the source and one of the target coincide.

    Cut both into pieces of the source's stride: source entry i has pieces i .. i + wide - 1.
    Offset o counts the pairs (a, b), a < wide, b < long, with a + b = o + wide - 1.
    """
    wide, long = source.size // source.stride, target.size // source.stride
    weights = [0] * (wide + long - 1)
    for a in range(wide):
        for b in range(long):
            weights[a + b] += 1
    return tuple((index - (wide - 1), weight) for index, weight in enumerate(weights))


def _inner_taps(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """Source entries that lie wholly inside the target entry, once each."""
    return tuple((o, 1) for o in range((target.size - source.size) // source.stride + 1))


def _touching_taps(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """Source entries that share a token with the target entry, once each."""
    before = -(-source.size // source.stride) - 1
    return tuple((o, 1) for o in range(-before, target.size // source.stride))


def _around_taps(score: language.Score) -> tuple[tuple[int, int], ...]:
    """As many entries, the same one in their middle."""
    assert score.width is not None
    side = score.width // 2
    return tuple((o, 1) for o in range(-side, side + 1))


def _the_holder(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """The one source entry that the target entry lies in."""
    del source, target
    return ((0, 1),)


_TAPS = {
    "overlap_sum": _overlap_taps,
    "overlap_max": _touching_taps,
    "sum": _inner_taps,
    "max": _inner_taps,
    "avg_pool": _inner_taps,
    "upsample": _the_holder,
}
