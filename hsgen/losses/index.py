"""Launches of a KL of an index, and of its gradients.

Scores and what attention gives are made again, a turn of rows at a time, so that memory grows with the rows
of a turn times the keys, not with all rows: of a long call a quarter of the bytes of queries, outputs and the
index's queries.  What was chosen comes as it was chosen.
"""

from __future__ import annotations

from hsgen import learn, rows
from hsgen.errors import PlanError
from hsgen.graph import Attend, Divergence, Node, Round, Score, Select
from hsgen.learn import LINE, Index, LearnContext
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import next_power
from hsgen.schedule import text, vectors
from hsgen.schedule.draft import Draft

WIDE = 256  # of a head of attention: tiles of wider ones leave room for less
STEP = 64  # rows that keys are multiplied with at a time
MARKING = 256  # slots of a row's list that a program looks at at a time
PARTS = 8  # of the rows of a turn, at most, by which programs share a tile of keys
LANES = 1024  # tokens of a row, likewise


def divergence(draft: Draft, node: Node, op: Divergence, *, gradients: bool) -> dict[str, str]:
    """The launches of a KL.  -> buffers of gradients by tensor"""
    graph = draft.graph
    score = graph[node.inputs[0]]
    assert isinstance(score.op, Score), "refused"
    for name in score.inputs[:2]:
        if isinstance(rounded := graph[name].op, Round):
            vectors.make(draft, graph[name], rounded)
    lse = _log_sum_exp(draft, node, op)
    index = _index(draft, node, op, score.op)
    loss = index.loss
    scorer = learn.scores(index)
    config = _tiles(draft, scorer)
    draft.kernel("learn", scorer, config, score.name, node.name)
    by_row = learn.rows(index, derives=gradients)
    draft.kernel("learn", by_row, _lanes(by_row), node.name, follows=scorer.name)
    scratch = f"scores_of_{loss}", f"target_of_{loss}"
    lines, turn = f"lines_{loss}", f"turn_{loss}"
    block_t = f'config["{scorer.name}"]["BLOCK_T"]'
    row = f"{lines} * {LINE}"
    held = draft.held + 2 * index.heads * index.dim
    vectors_of, weight = _index_arguments(draft, score)
    seq = (lines, *text.SEQ, "tile_first")
    buffers = [
        *(
            Buffer(name=name, dtype="f32", dims=(f"{turn} * {block_t}", row), role="scratch")
            for name in scratch
        ),
        Buffer(
            name=f"rows_of_{loss}",
            dtype="f32",
            dims=("batch.rows", "2"),
            role="output",
            zeros=True,
        ),
    ]
    launches = [
        Launch(
            kernel=scorer.name,
            grid=("count", f"{row} // {{BLOCK_N}}"),
            arguments=(
                *vectors_of,
                *weight,
                *draft.tensor(node.inputs[1]),
                *draft.tensor(node.inputs[2]),
                *text.strides(lse),
                *scratch,
                *seq,
            ),
        ),
        Launch(
            kernel=by_row.name,
            grid=(f"count * {block_t}",),
            arguments=(*scratch, *_lists(draft, node, op, score), f"rows_of_{loss}", *seq),
        ),
    ]
    made: dict[str, str] = {}
    sizes: list[tuple[str, str]] = []
    if gradients:
        made = {_source(draft, name): f"grad_{_source(draft, name)}" for name in score.inputs[:3]}
        if not index.weighted:
            made = {_source(draft, x): f"grad_{_source(draft, x)}" for x in score.inputs[:2]}
        buffers += _grads(draft, made, _source(draft, score.inputs[1]), f"parts_{loss}")
        launches += _derived(draft, node, index, score, scratch[0])
        keys = text.input_of(_source(draft, score.inputs[1]))
        sizes = [
            (f"length_{loss}", f"0 if batch.packed else {keys}.shape[1]"),
            (f"keys_{loss}", f"{keys}.shape[0] * {keys}.shape[1]"),
            (
                f"key_tiles_{loss}",
                f'keys_{loss} // config["dk_{loss}"]["BLOCK_N"] + batch.sequences',
            ),
            (f"parts_{loss}", f"max(1, min({PARTS}, {4 * draft.target.sms} // key_tiles_{loss}))"),
        ]
    draft.steps.append(
        Step(
            title=f"loss: {loss}",
            needs=(
                *(_source(draft, name) for name in score.inputs[: 2 + index.weighted]),
                *node.inputs[1:3],
            ),
            makes=(node.name,),
            buffers=tuple(buffers),
            launches=tuple(launches),
            sizes=(
                *sizes,
                (lines, f"max(1, (batch.keys + {LINE - 1}) // {LINE})"),
                (f"tiles_{loss}", text.tiles_of(scorer.name)),
                (f"bytes_{loss}", f"{8 * LINE} * {lines} * {block_t}"),
                (f"most_{loss}", f"max(SCRATCH_BYTES, batch.rows * {held // 4})"),
                (turn, f"min(tiles_{loss}, max(1, most_{loss} // bytes_{loss}))"),
            ),
            tiles=f"tiles_{loss}",
            chunk=turn,
        )
    )
    return made


def _index(draft: Draft, node: Node, op: Divergence, score: Score) -> Index:
    sizes, shape = draft.graph.sizes, draft.shape
    chosen = draft.graph[node.inputs[3]] if op.over == "selected" else None
    parent = _parent(draft, draft.graph[node.inputs[0]])
    return Index(
        loss=node.name.removeprefix("loss."),
        heads=sizes["Hi"],
        dim=sizes["Di"],
        weighted=score.form == "relu_weighted",
        scale=1.0 if score.scale is None else score.scale,
        query_heads=shape.query_heads,
        group=shape.group,
        qk=shape.qk,
        attention_scale=_scale(draft, op),
        most=op.heads == "max",
        causal=shape.causal,
        width=draft.width(chosen) if chosen else 0,
        parents=draft.width(parent) if parent else 0,
        parent_size=parent.op.size if parent and isinstance(parent.op, Select) else 1,
        precision=shape.precision,
    )


def _parent(draft: Draft, score: Node) -> Node | None:
    """The selection whose children are scored."""
    assert isinstance(score.op, Score)
    if score.op.within is None:
        return None
    return next(x for x in draft.graph.operands(score) if isinstance(x.op, Select))


def _scale(draft: Draft, op: Divergence) -> float:
    return op.scale if op.scale is not None else draft.shape.qk**-0.5


def _source(draft: Draft, name: str) -> str:
    """The caller's tensor behind one that is rounded."""
    node = draft.graph[name]
    return node.inputs[0] if isinstance(node.op, Round) else name


def _index_arguments(draft: Draft, score: Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Queries and keys of the index with their strides, and its weights, if it has any."""
    assert isinstance(score.op, Score)
    queries, keys, *others = score.inputs
    weighted = score.op.form == "relu_weighted"
    vectors_of = (*draft.tensor(queries), *draft.tensor(keys)[:3])
    return vectors_of, draft.tensor(others[0])[:3] if weighted else ()


def _lists(draft: Draft, node: Node, op: Divergence, score: Node) -> tuple[str, ...]:
    """What rows chose, and the parents that they chose: tensors, with strides of batch, token and slot."""
    names = [node.inputs[3]] if op.over == "selected" else []
    parent = _parent(draft, score)
    found: list[str] = []
    for name in (*names, *((parent.name,) if parent else ())):
        x = text.buffer(name)
        found += (*text.strides(x)[:3], f"{x}.stride(3)")
    return tuple(found)


def _log_sum_exp(draft: Draft, node: Node, op: Divergence) -> str:
    """Of every row and head, over all tokens that the row sees.  -> its buffer"""
    latents = [x.op for x in draft.graph.nodes() if isinstance(x.op, Attend) and x.op.latent]
    shape = draft.shape_of(latents[0]) if latents else draft.shape
    name = f"lse_{node.name.removeprefix('loss.')}"
    context = rows.log_sum_exp_of_all(shape, name=name, scale=_scale(draft, op))
    draft.kernel("rows", context, draft.row_tiles.attend(context, limit=128), node.name)
    made, tiles = f"made_{name}", f"tiles_{name}"
    draft.steps.append(
        Step(
            title="log-sum-exp of attention",
            needs=node.inputs[1:3],
            makes=(name,),
            sizes=((tiles, text.tiles_of(name)), *text.parts(context)),
            buffers=(
                Buffer(
                    name=made,
                    dtype="f32",
                    dims=("in_q.shape[0]", str(shape.query_heads), "in_q.shape[1]"),
                    role="level",
                ),
            ),
            launches=(
                Launch(
                    kernel=name,
                    grid=text.grid(shape, context, tiles),
                    arguments=(
                        *draft.tensor(node.inputs[1]),
                        *draft.tensor(node.inputs[2]),
                        *text.strides(made),
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )
    return made


def _grads(draft: Draft, made: dict[str, str], keys: str, parts: str) -> list[Buffer]:
    """Room for gradients; those of keys, to which every turn adds, in float32 parts, to be summed."""
    found: list[Buffer] = []
    for name, buffer in made.items():
        of = draft.graph[name].type.dims
        dims = tuple(f"{text.input_of(name)}.shape[{i}]" for i in range(len(of)))
        found.append(
            Buffer(
                name=buffer,
                dtype="f32" if name == keys else "input",
                dims=(parts, *dims) if name == keys else dims,
                role="output",
                zeros=True,  # of what no row sees, or is none
            )
        )
    return found


def _derived(
    draft: Draft, node: Node, index: Index, score: Node, scores: str
) -> tuple[Launch, Launch]:
    """Gradients of the index, of a turn whose scratch has those of scores."""
    loss, scorer = index.loss, f"scores_{index.loss}"
    by_query, by_key = learn.queries(index), learn.keys(index)
    for context in (by_query, by_key):
        config = _tiles(draft, context).without("BLOCK_T")
        draft.kernel("learn", context, config, node.name, follows=scorer)
    queries, keys, *others = (_source(draft, name) for name in score.inputs)
    of_queries = text.strides(f"grad_{queries}")
    of_weights = text.strides(f"grad_{others[0]}")[:3] if index.weighted else ()
    x = f"grad_{keys}"
    of_keys = (x, f"{x}.stride(0)", f"0 if batch.packed else {x}.stride(1)", f"{x}.stride(2)")
    vectors_of, weight = _index_arguments(draft, score)
    shared = (*vectors_of, *weight, scores)
    lines = f"lines_{loss}"
    return (
        Launch(
            kernel=by_query.name,
            grid=("count", str(index.heads)),
            arguments=(*shared, *of_queries, *of_weights, lines, *text.SEQ, "tile_first"),
        ),
        Launch(
            kernel=by_key.name,
            grid=(f"key_tiles_{loss}", f"parts_{loss}"),
            arguments=(
                *shared,
                *of_keys,
                lines,
                f"length_{loss}",
                *text.SEQ,
                "tile_first",
                "count",
            ),
        ),
    )


def _tiles(draft: Draft, context: LearnContext) -> Config:
    """Rows and tokens of a tile, and how many are brought ahead; all kernels of a turn have as many rows.

    A group of four warps has 64 rows, or of keys 64 of these.
    """
    room = draft.target.smem_per_block
    if draft.dtype == "fp32":  # three-pass TF32 holds operands twice, in registers too
        return _config(context, 16, 32, num_warps=4, num_stages=1)
    largest = 64 if context.index.qk > WIDE else 128
    for block_t in (largest, largest // 2, largest // 4):
        if _bytes(learn.scores(context.index), block_t, block_t, 1) > room:
            continue  # no tile of scores, whose rows those of the others are
        block_n = {"scores": block_t, "queries": min(block_t, 64)}.get(context.how, LINE)
        warps = 4 if block_t < 128 and context.how == "queries" else 8
        for stages in (3, 2, 1):
            if _bytes(context, block_t, block_n, stages) <= room:
                return _config(context, block_t, block_n, num_warps=warps, num_stages=stages)
    raise PlanError(f"{context.name}: no tile fits the shared memory of {draft.target.label}")


def _bytes(context: LearnContext, block_t: int, block_n: int, stages: int) -> int:
    """Of shared memory: what stays, and what is brought `stages` at a time."""
    index = context.index
    match context.how:
        case "scores":  # of a head of attention both queries and keys
            return 2 * (block_n * index.dim + stages * (block_t + block_n) * index.qk)
        case "queries":  # keys, and gradients of scores
            return 2 * (block_t * index.dim + stages * block_n * (index.dim + 2 * block_t))
        case _:
            rows_ = min(block_t, STEP)
            return 2 * (block_n * (index.dim + rows_) + stages * rows_ * index.dim)


def _config(
    context: LearnContext, block_t: int, block_n: int, *, num_warps: int, num_stages: int
) -> Config:
    values = (("BLOCK_T", block_t), ("BLOCK_N", block_n))
    if context.how == "keys":
        values += (("BLOCK_R", min(block_t, STEP)),)
    return Config(constexprs=values, num_warps=num_warps, num_stages=num_stages)


def _lanes(context: LearnContext) -> Config:
    """A row is a program, which walks the scratch."""
    width = context.index.width
    slots = (("BLOCK_K", min(MARKING, next_power(width))),) if width else ()
    return Config(constexprs=(("BLOCK_N", LANES), *slots), num_warps=4, num_stages=1)
