"""Gradients of rows that attend by clusters: choices again, rows by bits, and keys that stay.

Every row has bits of the clusters of keys that it attends: those of its cluster, or of a list that a caller
brings.  Rows stay as in the forward; keys stay as they lie by cluster, and tiles of rows that chose none of
theirs are passed by.  Of a mean that is attended each of its tokens has the same share.
"""

from __future__ import annotations

from dataclasses import replace

from hsgen import cols, configs
from hsgen.backward import tiles
from hsgen.backward.gathered import Gradients
from hsgen.clusters import Clustering, ClustersContext, How
from hsgen.graph import Attend
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import clustering, text


def plan(made: Gradients, found: Clustering) -> tuple[str, ...]:
    """All gradients of a graph that attends by clusters.  -> kernels that choose as the forward's do"""
    draft = made.draft
    clustering.choose(draft, found)
    draft.steps = [
        replace(step, of="own" if any(x.endswith(".blocks") for x in step.makes) else None)
        for step in draft.steps
        if step.of != "rows"
    ]
    launched = {launch.kernel for step in draft.steps for launch in step.launches}
    draft.kernels = [kernel for kernel in draft.kernels if kernel.name in launched]
    again = tuple(kernel.name for kernel in draft.kernels)
    _bits(made, found)
    clustering.members(draft, found)
    _delta(made, found)
    _queries(made, found)
    _keys(made, found)
    return again


def _branch(found: Clustering) -> str:
    op = found.exact.op
    assert isinstance(op, Attend)
    return op.branch


def _kernel(
    made: Gradients, found: Clustering, name: str, how: How, *, given: bool = False
) -> ClustersContext:
    """A kernel of these, planned."""
    context = clustering.context_of(made.draft, found, name, how, given=given)
    config = configs.clusters(context, made.draft.dtype)
    made.draft.kernel("clusters", context, config, found.exact.name)
    return context


def _bits(made: Gradients, found: Clustering) -> None:
    """Of each row what its cluster chose, where no caller brings lists."""
    stage = found.attended
    level = clustering.level_of(stage)
    context = _kernel(made, found, f"bits_{level}", "bits")
    heads = str(context.query_heads)
    words = Buffer(
        name=clustering.words_of(found),
        dtype="i32",
        dims=("batch.rows", heads, str(context.words)),
        role="list",
    )
    tag = clustering.tag_of(found, rows=True)
    made.draft.steps.append(
        Step(
            title=f"bits of rows: {level}",
            needs=(f"{stage.select.name}.blocks", stage.rows.name),
            makes=(f"{stage.select.name}.members",),
            of="own",
            buffers=(words,),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=("batch.rows // {BLOCK_T} + batch.sequences", heads),
                    arguments=(
                        f"labels_{tag}",
                        *clustering.side_of(found, rows=True),
                        *(clustering.made_of(stage), words.name, *text.SEQ),
                    ),
                ),
            ),
        )
    )


def _lse(made: Gradients) -> str:
    (lse,) = dict.fromkeys(made.draft.graph.outputs.lse.values())
    return text.buffer(lse)


def _of_rows(made: Gradients) -> tuple[str, ...]:
    """The output's gradient, log-sum-exp and delta."""
    lse = _lse(made)
    return (*text.strides(made.grad_o), *text.strides(lse), f"delta_{lse}")


def _step(
    made: Gradients,
    found: Clustering,
    title: str,
    *,
    sizes: tuple[tuple[str, str], ...],
    buffers: tuple[Buffer, ...],
    launches: tuple[Launch, ...],
) -> None:
    branches = [x.name for x in (found.exact, found.rest) if x is not None]
    made.draft.steps.append(
        Step(
            title=f"{title}: {_branch(found)}",
            needs=("q", "k", "v"),
            makes=tuple(branches),
            sizes=sizes,
            buffers=buffers,
            launches=launches,
        )
    )


def _delta(made: Gradients, found: Clustering) -> None:
    """Of the one output that there is."""
    draft, lse = made.draft, _lse(made)
    heads = str(draft.shape.query_heads)
    context = cols.DeltaContext(name=f"delta_{_branch(found)}", head_dim=draft.shape.v)
    draft.kernel("merge", context, tiles.delta(), found.exact.name)
    output = text.buffer(draft.graph.outputs.o)
    of = (output, made.grad_o, f"grad_{lse}")
    dims = ("in_q.shape[0]", heads, "in_q.shape[1]")
    launch = Launch(
        kernel=context.name,
        grid=("batch.rows // {BLOCK_R} + batch.sequences", heads),
        arguments=(*(y for x in of for y in text.strides(x)), f"delta_{lse}", *text.SEQ),
    )
    buffers = (Buffer(name=f"delta_{lse}", dtype="f32", dims=dims, role="scratch"),)
    _step(made, found, "delta", sizes=(), buffers=buffers, launches=(launch,))


def _queries(made: Gradients, found: Clustering) -> None:
    """dq in the loops of a call whose rows have lists of their own."""
    draft, branch = made.draft, _branch(found)
    context = _kernel(made, found, f"dq_{branch}", "queries", given=True)
    counting = clustering.context_of(draft, found, f"tiles_{branch}", "tiles", rows=True)
    config = configs.clusters(counting, draft.dtype)
    draft.kernel("clusters", counting, config, found.exact.name, follows=context.name)
    buffers, _ = made.buffer("q")
    sizes, lists, launches, arguments = clustering.walked(
        draft, found, context, counting, given=True
    )
    outputs = (*_of_rows(made), *text.strides(made.buffers["q"]))
    launch = Launch(
        kernel=context.name,
        grid=(clustering.programs_of(branch),),
        arguments=(*arguments, *outputs, text.SEQ[0]),
    )
    _step(
        made,
        found,
        "queries",
        sizes=sizes,
        buffers=(*lists, *buffers),
        launches=(*launches, launch),
    )


def _keys(made: Gradients, found: Clustering) -> None:
    """dk and dv, to which what means are given comes, if they are attended."""
    draft, branch = made.draft, _branch(found)
    keys, rows = (clustering.tag_of(found, rows=x) for x in (False, True))
    context = _kernel(made, found, f"dkv_{branch}", "keys")
    uniting = clustering.context_of(draft, found, f"unite_{branch}", "unite")
    config = configs.clusters(uniting, draft.dtype)
    draft.kernel("clusters", uniting, config, found.exact.name, follows=context.name)
    heads, key_heads = str(context.query_heads), str(context.kv_heads)
    united, count = f"united_{branch}", f"row_tiles_{branch}"
    words = clustering.words_of(found)
    of_rows = (f"order_{rows}", *clustering.side_of(found, rows=True), words)
    buffers = tuple(x for name in ("k", "v") for x in made.buffer(name)[0])
    dims = ("batch.sequences", heads, count, str(context.words))
    buffers = (*buffers, Buffer(name=united, dtype="i32", dims=dims, role="list"))
    launches = [
        Launch(
            kernel=uniting.name,
            grid=(count, heads, "batch.sequences"),
            arguments=(*of_rows, united, count, text.SEQ[0]),
        )
    ]
    parts: tuple[str, ...] = ()
    if found.rest is not None:
        means = _kernel(made, found, f"dkv_means_{branch}", "means")
        parts = (f"part_k_{branch}", f"part_v_{branch}")
        of = ("batch.sequences", key_heads, str(context.key_clusters))
        buffers += tuple(
            Buffer(name=part, dtype="f32", dims=(*of, str(dim)), role="scratch")
            for part, dim in zip(parts, (context.head_dim, context.v_dim), strict=True)
        )
        arguments = (
            *draft.tensor("q"),
            f"begins_{keys}",
            *clustering.means_of(found),
            *(*of_rows, *_of_rows(made), *parts, text.SEQ[0]),
        )
        grid = (f"{context.key_clusters} // {{BLOCK_N}} + 1", key_heads, "batch.sequences")
        launches.append(Launch(kernel=means.name, grid=grid, arguments=arguments))
    tensors = tuple(x for name in ("q", "k", "v") for x in draft.tensor(name))
    launches.append(
        Launch(
            kernel=context.name,
            grid=("batch.keys // {BLOCK_N} + 1", key_heads, "batch.sequences"),
            arguments=(
                *(*tensors, f"order_{keys}", f"labels_{keys}"),
                *clustering.side_of(found, rows=False),
                *(*of_rows, *_of_rows(made), united, count, *parts),
                *(*made.grad("k"), *made.grad("v"), text.SEQ[0]),
            ),
        )
    )
    sizes = ((count, f'in_q.shape[1] // config["{context.name}"]["BLOCK_T"] + 1'),)
    _step(made, found, "keys", sizes=sizes, buffers=buffers, launches=tuple(launches))
