"""Launches of learned trees: leaves of tokens, rows down the levels, and the best tokens of their leaves."""

from __future__ import annotations

from hsgen import configs, trees
from hsgen.errors import PlanError
from hsgen.graph import Assign, Node, Pool, Reduce, Score, Select
from hsgen.plan import Buffer, Launch, Step
from hsgen.schedule import text
from hsgen.schedule.draft import Draft
from hsgen.trees import How, Stage, Tree, TreesContext

PROGRAMS = (
    4  # a processor, of those that sift, each with a scratch; twice as many where none scores
)


def launched(draft: Draft, node: Node) -> bool:
    """Whether a node is a tree's, which then gets what it needs: lists of leaves, once, or a choice."""
    tree = trees.tree_of(draft.graph, node)
    if tree is None:
        return False
    stage = next((x for x in tree.stages if x.select is node), None)
    if stage is not None:
        _descend(draft, node, tree, stage)
    elif node is tree.select:
        _sift(draft, node, tree)
    elif isinstance(node.op, Assign | Pool) and not any(node.name in x.makes for x in draft.steps):
        _build(draft, tree)
    return True


def _build(draft: Draft, tree: Tree) -> None:
    """Everything that is known of a tree without queries."""
    if draft.cached:
        raise PlanError(
            f"level {_level(tree.stages[0])}: no kernel goes down a tree behind a cache yet",
            span=tree.stages[0].assign.span,
        )
    launches, buffers, sizes = list[Launch](), list[Buffer](), list[tuple[str, str]]()
    keys = tree.stages[0].assign.inputs[0]
    heads = str(draft.shape.kv_heads)
    leaf = tree.stages[-1].assign
    name = _tree(tree)
    rows_of, length, chunks = f"key_rows_{name}", f"length_{name}", f"chunks_{name}"
    x = text.input_of(keys)
    sizes += (
        (rows_of, f"{x}.shape[0] * {x}.shape[1]"),
        (length, f"0 if batch.packed else {x}.shape[1]"),
        (chunks, f"max(1, (batch.keys + {trees.CHUNK - 1}) // {trees.CHUNK})"),
    )
    above: str | None = None
    for stage in tree.stages:
        level, unit, nodes = (
            _level(stage),
            text.buffer(stage.keys.name),
            text.buffer(stage.assign.name),
        )
        centroids = text.input_of(stage.assign.inputs[1])
        made = _context(draft, tree, f"unit_{level}", "unit", stage)
        draft.kernel("trees", made, configs.trees(made, draft.dtype), stage.keys.name)
        buffers.append(
            Buffer(
                name=unit,
                dtype="f32",
                dims=(heads, str(made.nodes), str(made.head_dim)),
                role="level",
            )
        )
        launches.append(
            Launch(
                kernel=made.name,
                grid=(f"{made.nodes} // {{BLOCK_E}} + 1", heads),
                arguments=(centroids, f"{centroids}.stride(0)", f"{centroids}.stride(1)", unit),
            )
        )
        made = _context(draft, tree, f"assign_{level}", "assign", stage)
        draft.kernel("trees", made, configs.trees(made, draft.dtype), stage.assign.name)
        buffers.append(Buffer(name=nodes, dtype="i32", dims=(heads, rows_of), role="list"))
        launches.append(
            Launch(
                kernel=made.name,
                grid=("batch.keys // {BLOCK_N} + 1", heads, "batch.sequences"),
                arguments=(
                    *draft.tensor(keys),
                    unit,
                    *((above,) if above else ()),
                    nodes,
                    rows_of,
                    length,
                    text.SEQ[0],
                ),
            )
        )
        above = nodes
    assert above is not None, "a tree has a level"
    counts, first = f"counts_{name}", f"first_{name}"
    padded = _context(draft, tree, "", "tally", tree.stages[-1]).padded_leaves
    of = ("batch.sequences", heads)
    buffers += (
        Buffer(name=counts, dtype="i32", dims=(*of, f"{chunks} + 1", str(padded)), role="list"),
        Buffer(name=first, dtype="i32", dims=(*of, str(padded)), role="list", zeros=True),
    )
    listing: tuple[tuple[How, tuple[str, ...], tuple[str, ...]], ...] = (
        ("tally", (chunks, *reversed(of)), (above, counts, first, rows_of, chunks, length)),
        ("before", tuple(reversed(of)), (counts, chunks)),
    )
    for how, grid, arguments in listing:
        made = _context(draft, tree, f"{how}_{name}", how, tree.stages[-1])
        draft.kernel("trees", made, configs.trees(made, draft.dtype), leaf.name)
        launches.append(Launch(kernel=made.name, grid=grid, arguments=(*arguments, text.SEQ[0])))
    nodes_made = [x.name for stage in tree.stages for x in (stage.keys, stage.assign)]
    inputs = [keys, *(stage.assign.inputs[1] for stage in tree.stages)]
    draft.steps.append(
        Step(
            title=f"leaves of tokens: {name}",
            needs=tuple(inputs),
            makes=tuple(nodes_made),
            sizes=tuple(sizes),
            buffers=tuple(buffers),
            launches=tuple(launches),
        )
    )


def _descend(draft: Draft, node: Node, tree: Tree, stage: Stage) -> None:
    """Scores of all nodes of a level, in registers, and the best of each row."""
    name, level, heads = _tree(tree), _level(stage), draft.shape.kv_heads
    parent = _parent(stage)
    context = _context(draft, tree, f"descend_{level}", "descend", stage)
    nodes = (stage.score.name, stage.reduce.name, node.name)
    draft.kernel("trees", context, configs.trees(context, draft.dtype), *nodes)
    leaf = tree.stages[-1].assign.name
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=("q", stage.keys.name, leaf, *((parent,) if parent else ())),
            makes=(node.name,),
            buffers=(_chosen(draft, node),),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(text.tiles(), str(heads)),
                    arguments=(
                        *draft.tensor("q"),
                        text.buffer(stage.keys.name),
                        *((text.buffer(parent),) if parent else ()),
                        f"first_{name}",
                        text.buffer(node.name),
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )


def _sift(draft: Draft, node: Node, tree: Tree) -> None:
    """The tokens of each row's leaves where it keeps all, and where it does not the best by their scores."""
    name, heads = _tree(tree), draft.shape.kv_heads
    last = tree.stages[-1]
    assert isinstance(node.op, Select)
    level, parent, keys = node.op.level, last.select.name, tree.score.inputs[1]
    keep = _context(draft, tree, f"keep_{level}", "keep", None)
    sift = _context(draft, tree, f"sift_{level}", "sift", None)
    draft.kernel("trees", keep, configs.trees(keep, draft.dtype), node.name)
    nodes = (tree.score.name, tree.reduce.name, node.name)
    draft.kernel("trees", sift, configs.trees(sift, draft.dtype), *nodes, follows=keep.name)
    tiles, most = f"tiles_{level}", f"most_{level}"
    block_t = f'config["{keep.name}"]["BLOCK_T"]'
    sizes: list[tuple[str, str]] = [
        (tiles, text.tiles_of(keep.name)),
        (most, f"max(SCRATCH_BYTES // 4, batch.rows * {draft.held // 4}) // 4"),
    ]
    # of one kernel, then of the other
    scratch, words = f"scratch_{level}", f"words_{level}"
    launches, needed = list[Launch](), list[str]()
    for made, programs, of_rows, vectors in (
        (keep, 2 * PROGRAMS, "", ()),
        (
            sift,
            PROGRAMS,
            f"{2 * sift.room + trees.MOST_STEP + 2} * {block_t}",
            (*draft.tensor("q"), *draft.tensor(keys)),
        ),
    ):
        room, count = (f"{x}_{made.name}" for x in ("room", "programs"))
        turns, rows = f"turns_{made.name}", f"rows_{made.name}"
        ring = f'{made.padded_leaves} + 4 * config["{made.name}"]["BLOCK_K"]'
        if of_rows:
            sizes.append((rows, of_rows))
        sizes += (
            (room, f"{ring} + {rows}" if of_rows else ring),
            (turns, f"min({tiles} * {heads}, {programs} * batch.processors)"),
            (count, f"max(1, min({turns}, {most} // {room}))"),
        )
        each = f"words_{made.name}"
        sizes.append((each, f"{count} * {room}"))
        needed.append(each)
        launches.append(
            Launch(
                kernel=made.name,
                grid=(count,),
                arguments=(
                    *vectors,
                    text.buffer(parent),
                    text.buffer(last.assign.name),
                    f"counts_{name}",
                    f"key_rows_{name}",
                    f"length_{name}",
                    f"chunks_{name}",
                    scratch,
                    room,
                    text.buffer(node.name),
                    tiles,
                    *text.SEQ,
                ),
            )
        )
    sizes.append((words, f"max({', '.join(needed)})"))
    draft.steps.append(
        Step(
            title=f"choose: {level}",
            needs=("q", keys, last.assign.name, parent),
            makes=(node.name,),
            sizes=tuple(sizes),
            buffers=(
                Buffer(name=scratch, dtype="i32", dims=(words,), role="scratch"),
                _chosen(draft, node),
            ),
            launches=tuple(launches),
        )
    )


def _chosen(draft: Draft, node: Node) -> Buffer:
    dims = ("in_q.shape[0]", "in_q.shape[1]", str(draft.shape.kv_heads), str(draft.width(node)))
    return Buffer(name=text.buffer(node.name), dtype="i32", dims=dims, role="selection")


def _context(draft: Draft, tree: Tree, name: str, how: How, stage: Stage | None) -> TreesContext:
    """A kernel of a tree: of one level, or of what is below it."""
    shape = draft.shape
    leaves, last = tree.stages[-1].assign.op, tree.stages[-1]
    of = stage or last
    assert isinstance(leaves, Assign)
    assert isinstance(of.assign.op, Assign)
    score, reduce, select = (
        (stage.score, stage.reduce, stage.select)
        if stage
        else (tree.score, tree.reduce, tree.select)
    )
    assert isinstance(score.op, Score)
    assert isinstance(reduce.op, Reduce)
    assert isinstance(select.op, Select)
    scale = score.op.scale if score.op.scale is not None else 1.0
    parent = _parent(stage) if stage else last.select.name
    return TreesContext(
        name=name,
        how=how,
        heads=shape.kv_heads,
        group=shape.group,
        head_dim=shape.qk,
        nodes=of.assign.op.nodes,
        branching=of.assign.op.branching,
        leaves=leaves.nodes,
        scale=scale / shape.group if reduce.op.how == "mean" else scale,
        k=select.op.k,
        width=draft.width(select),
        first=select.op.first,
        last=select.op.last,
        counted=select.op.counted,
        beam=draft.width(draft.graph[parent]) if parent else 0,
        causal=shape.causal,
        above=len(of.assign.inputs) > 2,
        precision=shape.precision,
        cuts={"fp32": 1, "fp16": 0}.get(draft.dtype, 3),  # a sum of heads may be beyond fp16
    )


def _tree(tree: Tree) -> str:
    """What it is called in the driver: as its last level."""
    return _level(tree.stages[-1])


def _level(stage: Stage) -> str:
    assert isinstance(stage.keys.op, Pool)
    return stage.keys.op.level


def _parent(stage: Stage) -> str | None:
    """The selection that a level's nodes are below."""
    assert isinstance(stage.select.op, Select)
    return stage.select.inputs[1] if stage.select.op.within else None
