"""Launches of rows that attend by clusters: rounds of k-means, what clusters choose, and tiles of each."""

from __future__ import annotations

from dataclasses import replace

from hsgen import clusters, configs
from hsgen.clusters import CHUNK, PLACED, Clustering, ClustersContext, How, Stage
from hsgen.graph import Attend, Cluster, Node, Score, SelectSet
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import text
from hsgen.schedule.draft import Draft
from hsgen.together import Part, given_of

PROGRAMS = 2  # a processor, of those that attend, each with a scratch
TURNS = 16  # scores of a turn are such a part of what a row of queries and outputs is


def launched(draft: Draft, node: Node) -> bool:
    """Whether a node is one of those that attend by clusters, of which the last one gets all launches."""
    found = clusters.clustering_of(draft.graph)
    if found is None or node.name not in found.names:
        return False
    if node is found.exact:
        _plan(draft, found)
    return True


def _plan(draft: Draft, found: Clustering) -> None:
    choose(draft, found)
    _attend(draft, found)
    members(draft, found)
    _attend(draft, found, given=True)


def choose(draft: Draft, found: Clustering) -> None:
    """Clusters, and what those of rows choose."""
    stage = found.attended
    _cluster(draft, found, stage.keys)
    _cluster(draft, found, stage.rows)
    if found.error is not None:
        _values(draft, found, found.error)
    for each in found.stages:
        _choose(draft, found, each)


# --- names in the driver


def tag_of(found: Clustering, *, rows: bool) -> str:
    """A side, after the level that is attended."""
    return f"{level_of(found.attended)}_{'rows' if rows else 'keys'}"


def level_of(stage: Stage) -> str:
    assert isinstance(stage.select.op, SelectSet)
    return stage.select.op.level


def side_of(found: Clustering, *, rows: bool) -> tuple[str, str]:
    """How many rows a tensor has of all sequences, and from one sequence to the next."""
    tag = tag_of(found, rows=rows)
    return f"all_{tag}", f"length_{tag}"


def _sizes(found: Clustering, *, rows: bool) -> tuple[tuple[str, str], ...]:
    x = text.input_of("q" if rows else "k")
    every, length = side_of(found, rows=rows)
    return (
        (every, f"{x}.shape[0] * {x}.shape[1]"),
        (length, f"0 if batch.packed else {x}.shape[1]"),
    )


def _tokens(*, rows: bool) -> str:
    """Of the longest sequence, at most."""
    return "in_q.shape[1]" if rows else "batch.keys"


# --- clusters


def _cluster(draft: Draft, found: Clustering, node: Node) -> None:
    """Centroids that are tokens; then rounds, all of them, of which those of a still sequence do nothing."""
    op = node.op
    assert isinstance(op, Cluster)
    rows = op.of == "queries"
    tag, source = tag_of(found, rows=rows), node.inputs[0]
    every, length = side_of(found, rows=rows)
    chunks = f"chunks_{tag}"
    x = draft.tensor(source)
    names = {
        name: f"{name}_{tag}"
        for name in ("centers", "half", "moved", "labels", "counts", "begins", "order")
    }
    contexts = {
        how: context_of(draft, found, f"{how}_{tag}", how, rows=rows)
        for how in ("start", "assign", "tally", "starts", "place", "update")
    }
    k = contexts["start"]
    heads, of = str(k.heads), ("batch.sequences", str(k.heads))
    tokens = _tokens(rows=rows)
    made = tuple(getattr(stage, "rows" if rows else "keys").name for stage in found.stages)
    for context in contexts.values():
        draft.kernel("clusters", context, configs.clusters(context, draft.dtype), *made)
    centers = (*of, str(k.cuts), str(k.clusters), str(k.head_dim))
    draft.steps.append(
        Step(
            title=f"centroids: {tag}",
            needs=(source,),
            makes=(f"{node.name}.start",),
            buffers=(
                Buffer(name=names["centers"], dtype="input", dims=centers, role="level"),
                Buffer(name=names["half"], dtype="f32", dims=(*of, str(k.clusters)), role="level"),
            ),
            launches=(
                Launch(
                    kernel=k.name,
                    grid=(f"{k.clusters} // {{BLOCK_E}} + 1", *reversed(of)),
                    arguments=(*x, names["centers"], names["half"], text.SEQ[0]),
                ),
            ),
        )
    )
    seq = (*text.SEQ, "tile_first")
    at = (names["labels"], every, length)
    place = f"{tokens} // {PLACED} + 1"
    side = tuple(reversed(of))
    launches: tuple[tuple[How, tuple[str, ...], tuple[str, ...]], ...] = (
        (
            "assign",
            (f"{tokens} // {{BLOCK_N}} + 1", *side),
            (*x, names["centers"], names["half"], *at, names["moved"]),
        ),
        (
            "tally",
            (f"{tokens} // {CHUNK} + 1", *side),
            (*at, names["counts"], chunks, names["moved"]),
        ),
        ("starts", side, (names["counts"], chunks, length, names["begins"], names["moved"])),
        (
            "place",
            (place, *side),
            (*at, names["counts"], chunks, names["begins"], names["order"], names["moved"]),
        ),
        (
            "update",
            (str(k.clusters), *side),
            (
                *(*x, names["begins"], names["order"], every, length),
                *(names["centers"], names["half"], names["moved"]),
            ),
        ),
    )
    draft.steps.append(
        Step(
            title=f"clusters: {tag}",
            needs=(source, f"{node.name}.start"),
            makes=made,
            sizes=(
                *_sizes(found, rows=rows),
                (chunks, f"{every} // {CHUNK} + batch.sequences"),
                (f"rounds_{tag}", str(k.iterations)),
                (f"each_{tag}", "1"),
            ),
            buffers=(
                Buffer(
                    name=names["moved"],
                    dtype="i32",
                    dims=(str(k.iterations), *of),
                    role="list",
                    zeros=True,
                ),
                Buffer(name=names["labels"], dtype="i32", dims=(heads, every), role="list"),
                Buffer(
                    name=names["counts"],
                    dtype="i32",
                    dims=(heads, chunks, str(k.padded)),
                    role="list",
                ),
                Buffer(
                    name=names["begins"], dtype="i32", dims=(*of, str(k.padded + 1)), role="list"
                ),
                Buffer(name=names["order"], dtype="i32", dims=(heads, every), role="list"),
            ),
            launches=tuple(
                Launch(kernel=contexts[how].name, grid=grid, arguments=(*arguments, *seq))
                for how, grid, arguments in launches
            ),
            tiles=f"rounds_{tag}",
            chunk=f"each_{tag}",
        )
    )


# --- choices


def _chosen(stage: Stage) -> str:
    """The node of what clusters of rows chose."""
    return f"{stage.select.name}.blocks"


def made_of(stage: Stage) -> str:
    return text.buffer(_chosen(stage))


def _kept(found: Clustering) -> str:
    return f"kept_{level_of(found.mass)}"


def _values(draft: Draft, found: Clustering, stage: Stage) -> None:
    """Means of values, and three numbers of every slot's value: how it lies to that of its cluster."""
    assert stage.values is not None
    context = context_of(draft, found, f"values_{level_of(stage)}", "values")
    draft.kernel("clusters", context, configs.clusters(context, draft.dtype), stage.values.name)
    tag, (every, length) = tag_of(found, rows=False), side_of(found, rows=False)
    of = ("batch.sequences", str(context.kv_heads))
    means, left = text.buffer(stage.values.name), f"left_{level_of(stage)}"
    dims = (*of, str(context.key_clusters), str(context.v_dim))
    draft.steps.append(
        Step(
            title=f"values: {level_of(stage)}",
            needs=("v", stage.keys.name),
            makes=(stage.values.name,),
            buffers=(
                Buffer(name=means, dtype="input", dims=dims, role="level"),
                Buffer(
                    name=left, dtype="f32", dims=("3", str(context.kv_heads), every), role="list"
                ),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(str(context.key_clusters), *reversed(of)),
                    arguments=(
                        *draft.tensor("v"),
                        *(f"begins_{tag}", f"order_{tag}", every, length),
                        *(means, left, text.SEQ[0]),
                    ),
                ),
            ),
        )
    )


def _choose(draft: Draft, found: Clustering, stage: Stage) -> None:
    """Scores of a turn of heads, and the best of each cluster of rows as bits; then lists of rows."""
    by_mass, level = stage.normalised is not None, level_of(stage)
    scoring = (
        context_of(draft, found, f"weigh_{level}", "score")
        if by_mass
        else context_of(draft, found, f"errors_{level}", "errors")
    )
    ranking = context_of(draft, found, f"choose_{level}", "choose", stage=stage)
    same, pools = found.attended, (stage.means.name, stage.queries.name)
    others = [x.name for x in (stage.lse, stage.normalised) if x is not None]
    draft.kernel(
        "clusters", scoring, configs.clusters(scoring, draft.dtype), *pools, stage.score.name
    )
    draft.kernel(
        "clusters",
        ranking,
        configs.clusters(ranking, draft.dtype),
        *others,
        stage.select.name,
    )
    keys, rows = tag_of(found, rows=False), tag_of(found, rows=True)
    every, length = side_of(found, rows=False)
    pairs, turn, scores = f"pairs_{level}", f"turn_{level}", f"scores_{level}"
    starts = f"begins_{keys}"
    each = scoring.row_clusters * scoring.padded_keys
    read: tuple[str, ...] = (f"centers_{rows}", f"centers_{keys}", starts)
    grid: tuple[str, ...] = (
        f"{scoring.row_clusters} // {{BLOCK_R}} + 1",
        f"max(1, {scoring.padded_keys} // {{BLOCK_E}})",
        "count",
    )
    arguments: tuple[str, ...] = (*read, scores, "tile_first")
    if not by_mass:
        grid = (grid[0], str(scoring.key_clusters), "count")
        left = f"left_{level}"
        read = (*draft.tensor("k"), *read, f"order_{keys}", every, length, left, scores)
        arguments = (*read, text.SEQ[0], "tile_first")
    made, told = made_of(stage), found.error is not None
    of = ("batch.sequences", str(ranking.query_heads), str(ranking.row_clusters))
    kept = Buffer(name=_kept(found), dtype="i32", dims=of, role="list")
    needs = [same.keys.name, same.rows.name]
    if not by_mass:
        assert stage.values is not None
        needs += ["k", stage.values.name, _chosen(found.mass)]
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=tuple(needs),
            makes=(_chosen(stage),),
            sizes=(
                (pairs, f"batch.sequences * {ranking.query_heads}"),
                (
                    turn,
                    f"min({pairs}, max(1, min(SCRATCH_BYTES, batch.rows * {draft.held // TURNS})"
                    f" // {4 * each}))",
                ),
            ),
            buffers=(
                Buffer(
                    name=scores,
                    dtype="f32",
                    dims=(turn, str(scoring.row_clusters), str(scoring.padded_keys)),
                    role="scratch",
                ),
                Buffer(name=made, dtype="i32", dims=(*of, str(ranking.words)), role="list"),
                *((kept,) if told and by_mass else ()),
            ),
            launches=(
                Launch(kernel=scoring.name, grid=grid, arguments=arguments),
                Launch(
                    kernel=ranking.name,
                    grid=(f"{ranking.row_clusters} // {{BLOCK_R}} + 1", "count"),
                    arguments=(
                        *(scores, starts, made),
                        *((_kept(found),) if told else ()),
                        "tile_first",
                    ),
                ),
            ),
            tiles=pairs,
            chunk=turn,
        )
    )
    _spread(draft, found, stage)


def _spread(draft: Draft, found: Clustering, stage: Stage) -> None:
    """Every row's list of what its cluster chose, where anybody asks for it."""
    context = context_of(draft, found, f"spread_{level_of(stage)}", "spread")
    draft.kernel("clusters", context, configs.clusters(context, draft.dtype), stage.select.name)
    every, length = side_of(found, rows=True)
    made = text.buffer(stage.select.name)
    heads, slots = str(context.query_heads), str(context.key_clusters)
    draft.steps.append(
        Step(
            title=f"lists of rows: {level_of(stage)}",
            needs=(_chosen(stage), found.attended.rows.name),
            makes=(stage.select.name,),
            of="rows",
            buffers=(
                Buffer(
                    name=made,
                    dtype="i32",
                    dims=("in_q.shape[0]", "in_q.shape[1]", heads, slots),
                    role="selection",
                ),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=("batch.rows // {BLOCK_T} + batch.sequences", heads),
                    arguments=(
                        *(f"labels_{tag_of(found, rows=True)}", every, length),
                        *(made_of(stage), made, *text.SEQ),
                    ),
                ),
            ),
        )
    )


# --- attention


def _outputs(draft: Draft) -> tuple[tuple[Buffer, ...], tuple[str, ...]]:
    """The output and its log-sum-exp, and these as kernels are given them."""
    outputs, heads = draft.graph.outputs, str(draft.shape.query_heads)
    (lse,) = dict.fromkeys(outputs.lse.values())
    rows_of = ("in_q.shape[0]", "in_q.shape[1]", heads, str(draft.shape.v))
    o, sums = text.buffer(outputs.o), text.buffer(lse)
    return (
        Buffer(name=o, dtype="input", dims=rows_of, role="output"),
        Buffer(
            name=sums,
            dtype="f32",
            dims=("in_q.shape[0]", heads, "in_q.shape[1]"),
            role="output",
        ),
    ), (*text.strides(o), *text.strides(sums))


def _computed(draft: Draft, found: Clustering) -> tuple[str, ...]:
    """The nodes that attention makes."""
    branches = [x for x in (found.exact, found.rest) if x is not None]
    outputs = draft.graph.outputs
    own = [name for x in branches for name in (x.name, *draft.lse_of(x))]
    return tuple(dict.fromkeys((*own, outputs.o, *outputs.lse.values())))


def means_of(found: Clustering) -> tuple[str, ...]:
    """What stands for clusters that were not chosen, where they are attended."""
    values = found.attended.values
    if found.rest is None or values is None:
        return ()
    return f"centers_{tag_of(found, rows=False)}", text.buffer(values.name)


def _attend(draft: Draft, found: Clustering, *, given: bool = False) -> None:
    """Tiles of each cluster of rows, over a list of tokens that their program writes down.

    given: rows have lists of the caller's; a tile walks what any of its rows chose, in the same steps.
    """
    op, stage = found.exact.op, found.attended
    assert isinstance(op, Attend)
    own = f"attend_{op.branch}"
    name = f"given_{op.branch}" if given else own
    context = context_of(draft, found, name, "attend", given=given)
    counting = context_of(draft, found, f"tiles_{op.branch}", "tiles", rows=True)
    computed = _computed(draft, found)
    if not given:
        draft.kernel(
            "clusters",
            counting,
            configs.clusters(counting, draft.dtype),
            found.exact.name,
            follows=own,
        )
    draft.kernel(
        "clusters",
        context,
        configs.clusters(context, draft.dtype),
        *computed,
        follows=own if given else None,
    )
    buffers, outputs = _outputs(draft)
    sizes, lists, launches, arguments = walked(
        draft, found, replace(context, name=own), counting, given=given
    )
    made = f"{stage.select.name}.members" if given else _chosen(stage)
    draft.steps.append(
        Step(
            title=f"attend: {op.branch}" + ", over a selection of the caller's" * given,
            needs=("q", "k", "v", made, stage.keys.name, stage.rows.name, *from_values(found)),
            makes=computed,
            of="given" if given else "own",
            sizes=sizes,
            buffers=(*lists, *buffers),
            launches=(
                *launches,
                Launch(
                    kernel=name,
                    grid=(programs_of(op.branch),),
                    arguments=(*arguments, *outputs, text.SEQ[0]),
                ),
            ),
        )
    )


def programs_of(branch: str) -> str:
    """How many programs take tiles of rows of a branch."""
    return f"programs_{branch}"


def walked(
    draft: Draft,
    found: Clustering,
    context: ClustersContext,
    counting: ClustersContext,
    *,
    given: bool,
) -> tuple[tuple[tuple[str, str], ...], tuple[Buffer, ...], tuple[Launch, ...], tuple[str, ...]]:
    """What programs that take tiles of rows of clusters read.  -> sizes, lists, their launches, arguments

    given: rows have bits of their own.
    """
    op = found.exact.op
    assert isinstance(op, Attend)
    rows, keys = tag_of(found, rows=True), tag_of(found, rows=False)
    tiles, scratch, room = (f"{x}_of_{op.branch}" for x in ("tiles", "scratch", "room"))
    rows_of, programs = f"rows_{op.branch}", programs_of(op.branch)
    most, items = f"most_{op.branch}", f"items_{op.branch}"
    of = ("batch.sequences", str(context.query_heads))
    chosen = (words_of(found), f"labels_{keys}") if given else (made_of(found.attended),)
    sizes = (
        (rows_of, f'config["{context.name}"]["BLOCK_T"]'),
        (most, f"in_q.shape[1] // {rows_of} + min({context.row_clusters}, in_q.shape[1])"),
        (items, f"batch.sequences * {context.query_heads} * {most}"),
        (programs, f"max(1, min({items}, {PROGRAMS} * batch.processors))"),
        (room, f"batch.keys + {2 * context.padded_keys}"),
    )
    lists = (
        Buffer(name=tiles, dtype="i32", dims=(*of, str(context.padded_rows + 1)), role="list"),
        Buffer(name=scratch, dtype="i32", dims=(programs, room), role="scratch"),
    )
    launch = Launch(
        kernel=counting.name, grid=tuple(reversed(of)), arguments=(f"begins_{rows}", tiles)
    )
    arguments = (
        *(*draft.tensor("q"), *draft.tensor("k"), *draft.tensor("v"), *chosen),
        *(f"begins_{keys}", f"order_{keys}", *side_of(found, rows=False)),
        *means_of(found),
        *(f"begins_{rows}", f"order_{rows}", *side_of(found, rows=True), tiles),
        *(scratch, room, most, items),
    )
    return sizes, lists, (launch,), arguments


def from_values(found: Clustering) -> tuple[str, ...]:
    """The means of values that are attended."""
    values = found.attended.values
    return (values.name,) if found.rest is not None and values is not None else ()


def words_of(found: Clustering) -> str:
    """The buffer of what rows chose for themselves."""
    return f"words_{level_of(found.attended)}"


def members(draft: Draft, found: Clustering) -> None:
    """A caller's lists as bits, in turns of tiles of rows."""
    op, stage = found.exact.op, found.attended
    assert isinstance(op, Attend)
    name, level = f"members_{op.branch}", level_of(stage)
    context = context_of(draft, found, name, "members")
    draft.kernel("clusters", context, configs.clusters(context, draft.dtype), found.exact.name)
    tiles, rows_of, chunk = f"tiles_{level}", f"rows_{level}", f"chunk_{level}"
    members, fit = f"scratch_{level}", f"fit_{level}"
    each = 4 * context.query_heads * context.padded_keys
    heads, chosen = str(context.query_heads), text.buffer(stage.select.name)
    words = Buffer(
        name=words_of(found),
        dtype="i32",
        dims=("batch.rows", heads, str(context.words)),
        role="list",
    )
    draft.steps.append(
        Step(
            title=f"bits of the caller's lists: {level}",
            needs=(stage.select.name,),
            makes=(f"{stage.select.name}.members",),
            of="given",
            sizes=(
                (rows_of, f'config["{name}"]["BLOCK_T"]'),
                (tiles, f"batch.rows // {rows_of} + batch.sequences"),
                (fit, f"SCRATCH_BYTES // ({each} * {rows_of})"),
                (chunk, f"min({tiles}, max(1, {fit}))"),
            ),
            buffers=(
                Buffer(
                    name=members,
                    dtype="i32",
                    dims=(f"{chunk} * {rows_of}", heads, str(context.padded_keys)),
                    role="scratch",
                ),
                words,
            ),
            launches=(
                Launch(
                    kernel=name,
                    grid=("count", heads),
                    arguments=(
                        *(*given_of(chosen), f"{chosen}.shape[3]", members, words.name),
                        *(*text.SEQ, "tile_first"),
                    ),
                ),
            ),
            tiles=tiles,
            chunk=chunk,
        )
    )


def context_of(
    draft: Draft,
    found: Clustering,
    name: str,
    how: How,
    *,
    rows: bool = False,
    stage: Stage | None = None,
    given: bool = False,
) -> ClustersContext:
    """A kernel of one side, or of both."""
    shape, attended = draft.shape, found.attended
    keys, row_side = attended.keys.op, attended.rows.op
    mass, choice = found.mass.score.op, (stage or found.mass).select.op
    assert isinstance(keys, Cluster)
    assert isinstance(row_side, Cluster)
    assert isinstance(mass, Score)
    assert isinstance(choice, SelectSet)
    scored = found.error.score.op if found.error and how == "errors" else mass
    assert isinstance(scored, Score)
    scale = scored.scale if scored.scale is not None else 1.0
    if how == "attend" or how in clusters.GRADIENTS:
        scale = clusters.scale_of(found.exact)
    context = ClustersContext(
        name=name,
        how=how,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.qk,
        v_dim=shape.v,
        row_clusters=row_side.clusters,
        key_clusters=keys.clusters,
        iterations=(row_side if rows else keys).iterations or 1,
        rows=rows,
        scale=scale,
        counted=bool(mass.counted),
        rest=found.rest is not None and how in ("attend", "queries", "keys"),
        given=given,
        precision=shape.precision,
        cuts=1 if draft.dtype == "fp32" else 3,
    )
    if how != "choose":
        return context
    by_mass = choice.rule == "top_p"
    return replace(
        context,
        mass=Part.units_of(choice.value) if by_mass else 0,
        least=choice.least or 0,
        tells=by_mass and found.error is not None,
    )
