"""Launches back through entries that gates weigh: of entries, then of tokens, gates and what is learned."""

from __future__ import annotations

from hsgen.backward import tiles
from hsgen.backward.gathered import Gradients
from hsgen.graph import Node, Norm, Pool, Rotate
from hsgen.kernels import SegmentsContext
from hsgen.plan import Buffer, Kernel, Launch, Step
from hsgen.schedule import text, vectors
from hsgen.schedule.draft import Draft
from hsgen.unweigh import How, UnweighContext


def unweigh(made: Gradients, entries: Node, pool: Node) -> None:
    """From gradients of entries to those of all that made them.

    entries: what a branch attends, the last of what follows the pool.
    """
    draft, op = made.draft, pool.op
    assert isinstance(op, Pool)
    chain, by = draft.finished(pool), _made(draft, pool)
    forward = by.context
    assert isinstance(forward, SegmentsContext)
    name, (tokens, gates, *position) = text.safe(entries.name), pool.inputs
    norms = [x.inputs[1] for x in chain if isinstance(x.op, Norm)]
    tables = [table for x in chain if isinstance(x.op, Rotate) for table in x.inputs[1:]]
    buffers, x, dim = list[Buffer](), text.input_of(tokens), forward.head_dim
    launches = list[Launch]()

    def kernel(how: How, adds: tuple[bool, bool] = (False, False)) -> str:
        context = UnweighContext(name=f"{how}_{name}", how=how, pool=forward, adds=adds)
        config = by.config if how == "unfinish" else tiles.unweigh(how, dim)
        return draft.kernel("segments", context, config, *(node.name for node in chain))

    def gradient(of: str) -> bool:
        more, adds = made.buffer(of)
        buffers.extend(more)
        return adds

    def launch(kernel: str, grid: tuple[str, ...], *arguments: str) -> None:
        launches.append(Launch(kernel=kernel, grid=grid, arguments=(*arguments, *text.SEQ)))

    left = tuple(f"{each}_{name}" for each in ("means", "sums", "of_means", "parts"))
    left = left if norms else left[:3]
    shape = (f"{x}.shape[0]", f"length_{name}", str(forward.heads), str(dim))
    buffers += (Buffer(name=each, dtype="f32", dims=shape, role="scratch") for each in left)
    grads, count, heads = made.levels[entries.name], f"count_{name}", str(forward.heads)
    weights, steps = tuple(map(text.input_of, norms)), f"{dim} // {{BLOCK_D}}"
    read = (
        *vectors.in_series(draft, tokens, op, draft.tensor(tokens), by_head=True),
        *vectors.gates_of(draft, gates, op, by_head=True),
        *map(text.input_of, position),
    )
    angles = tuple(argument for table in tables for argument in draft.tensor(table)[:3])
    entry_tiles = f"rows_{name} // {{BLOCK_E}} + batch.sequences"
    launch(kernel("unfinish"), (entry_tiles, heads), *read, *weights, *angles, grads, *left, count)
    adds = gradient(tokens), gradient(gates)
    sizes = (
        (f"tokens_{name}", f"0 if batch.packed else {x}.shape[1]"),
        (f"token_rows_{name}", f"{x}.shape[0] * {x}.shape[1]"),
    )
    of_tokens, of_gates = (made.buffers[each] for each in (tokens, gates))
    launch(
        kernel("unweigh", adds),
        (f"token_rows_{name} // {{BLOCK_V}} + batch.sequences", heads, steps),
        *(*read, *left[:3]),
        *_strides(of_tokens, op),
        *_strides(of_gates, op),
        *(f"tokens_{name}", count),
    )
    for each in position:
        assert not gradient(each), "a level's own"
        grid = (str(op.size), heads, steps)
        launch(kernel("slots"), grid, *read, *left[:3], made.buffers[each], count)
    for each in norms:
        assert not gradient(each), "a level's own"
        launch(kernel("norms"), (steps, "1"), left[3], made.buffers[each], count)
    if tables:
        assert not any(list(map(gradient, tables))), "a level's own"
        angles = tuple(argument for table in tables for argument in _angles(made.buffers[table]))
        launch(kernel("turns"), (entry_tiles, "1"), *weights, grads, left[0], *angles, count)
    draft.steps.append(
        Step(
            title=f"back through the pool: {pool.name}",
            needs=(*pool.inputs, *norms, *tables),
            makes=tuple(node.name for node in chain),
            buffers=tuple(buffers),
            launches=tuple(launches),
            sizes=sizes,
        )
    )


def _made(draft: Draft, pool: Node) -> Kernel:
    """What made the entries, again."""
    name = f"pool_{text.safe(pool.name)}"
    (made,) = (kernel for kernel in draft.kernels if kernel.name == name)
    return made


def _strides(x: str, op: Pool) -> tuple[str, ...]:
    """A gradient and its strides, with that of series behind the head's."""
    return (*text.strides(x), f"{x}.stride(3)") if op.series else text.strides(x)


def _angles(x: str) -> tuple[str, ...]:
    """That of a table, and its batch and token strides."""
    return text.strides(x)[:3]
