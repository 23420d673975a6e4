"""Launches around pools: entries again as the forward had them, and from their gradients back to tokens."""

from __future__ import annotations

from hsgen.backward import tiles, weighing
from hsgen.backward.gathered import Gradients
from hsgen.graph import Attend, Node, Pool
from hsgen.plan import Launch, Step
from hsgen.schedule import text, vectors
from hsgen.schedule.draft import Draft
from hsgen.unpool import How, UnpoolContext


def attended(draft: Draft) -> tuple[tuple[Node, Node], ...]:
    """Entries that a branch attends, and their pools; of those that only choose there is no gradient."""
    graph = draft.graph
    read = {
        name
        for node in graph.nodes()
        if isinstance(node.op, Attend) and node.op.over == "pooled"
        for name in node.inputs[1:3]
    }
    entries = [node for node in graph.nodes() if node.name in read]
    return tuple((node, pool) for node in entries if (pool := draft.pool_of(node.name)))


def pool_again(draft: Draft) -> None:
    """The entries, computed again: they are a small part of what the branch costs."""
    for _, pool in attended(draft):
        assert isinstance(pool.op, Pool)
        vectors.make(draft, pool, pool.op)


def unpool(made: Gradients) -> None:
    """From gradients of entries to those of tokens, and of what maps them."""
    for entries, pool in attended(made.draft):
        assert isinstance(pool.op, Pool)
        if pool.op.how == "gated":
            weighing.unweigh(made, entries, pool)
        else:
            assert entries is pool, "refused"
            _unpool(made, pool, pool.op)


def _unpool(made: Gradients, node: Node, op: Pool) -> None:
    draft, source = made.draft, made.draft.graph[node.inputs[0]]
    heads, dim = (draft.size(of) for of in source.type.dims[2:])
    name, x = text.safe(node.name), text.input_of(source.name)
    buffers, adds = made.buffer(source.name)
    grads, pool_length = made.levels[node.name], f"count_{name}"
    tokens = text.strides(made.buffers[source.name])
    launches: list[Launch] = []

    def kernel(how: How) -> str:
        context = UnpoolContext(
            name=f"{how}_{name}",
            how=how,
            pool=op.how,  # type: ignore[arg-type]  # refused, what has no kernel
            heads=heads,
            head_dim=dim,
            size=op.size,
            stride=op.stride,
            short=draft.entries(op, op.level).short,
            position=bool(op.position),
            precision=draft.target.dot_precision,
            adds=adds,
        )
        return draft.kernel("segments", context, tiles.unpool(how, dim, draft.dtype), node.name)

    if op.how != "linear":
        sizes = (
            (f"tokens_{name}", f"0 if batch.packed else {x}.shape[1]"),
            (f"token_rows_{name}", f"{x}.shape[0] * {x}.shape[1]"),
            (f"block_v_{name}", f'config["unpool_{name}"]["BLOCK_V"]'),
        )
        grid = (f"token_rows_{name} // block_v_{name} + batch.sequences", str(heads))
        arguments = (grads, *tokens, pool_length, f"tokens_{name}", *text.SEQ)
        launches.append(Launch(kernel=kernel("unpool"), grid=grid, arguments=arguments))
    else:
        weight, *position = node.inputs[1:]
        steps = f"({x}.shape[1] + {op.stride - 1}) // {op.stride}"
        sizes = (
            (f"steps_{name}", f"{steps} + batch.packed * batch.sequences"),
            (f"tokens_{name}", f"1 if batch.packed else steps_{name}"),
            (f"token_rows_{name}", f"{x}.shape[0] * steps_{name}"),
        )
        sizes += ((f"block_e_{name}", f'config["unmap_{name}"]["BLOCK_E"]'),)
        tiles_of = f"token_rows_{name} // block_e_{name} + batch.sequences"
        grid = (tiles_of, str(heads), str(op.stride))
        read = (grads, text.input_of(weight))
        arguments = (*read, *tokens, pool_length, f"tokens_{name}", *text.SEQ)
        launches.append(Launch(kernel=kernel("unmap"), grid=grid, arguments=arguments))
        of_weight, _ = made.buffer(weight)
        buffers += of_weight
        at = tuple(text.input_of(each) for each in position)
        tile = f'{dim} // config["weights_{name}"]["BLOCK_D"]'
        sizes += ((f"map_tile_{name}", tile),)
        sizes += ((f"map_tiles_{name}", f"map_tile_{name} * map_tile_{name}"),)
        launches.append(
            Launch(
                kernel=kernel("weights"),
                grid=(f"map_tiles_{name}", str(heads), str(op.size)),
                arguments=(
                    grads,
                    *draft.tensor(source.name),
                    *at,
                    made.buffers[weight],
                    pool_length,
                    *text.SEQ,
                ),
            )
        )
        if position:
            of_position, _ = made.buffer(position[0])
            buffers += of_position
            arguments = (*read, made.buffers[position[0]], pool_length, *text.SEQ)
            grid = (str(op.size), str(heads))
            launches.append(Launch(kernel=kernel("positions"), grid=grid, arguments=arguments))
    draft.steps.append(
        Step(
            title=f"back through the pool: {node.name}",
            needs=node.inputs,
            makes=(node.name,),
            buffers=buffers,
            launches=tuple(launches),
            sizes=sizes,
        )
    )
