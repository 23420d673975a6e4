"""Launches of an order of keys that are sorted inside segments: their weights, and the slots they have."""

from __future__ import annotations

from hsgen import sorting
from hsgen.configs import DType
from hsgen.graph import Node, Permute, Select, SelectSet
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.rows import next_power
from hsgen.schedule import text
from hsgen.schedule.draft import Draft
from hsgen.sorting import SortingContext


def segment(draft: Draft, selection: Node) -> int:
    """Tokens of the segments whose sorted tokens a selection's entries are; 0 where they are in place."""
    order = sorting.order_of(draft.graph, selection)
    if order is None:
        return 0
    assert isinstance(order.op, Permute)
    return order.op.segment or 0


def order(draft: Draft, selection: Node) -> tuple[str, ...]:
    """The order that says which entries have the first tokens, where some are forced for them."""
    assert isinstance(selection.op, Select | SelectSet)
    found = sorting.order_of(draft.graph, selection)
    return (found.name,) if found and selection.op.sink else ()


def sinks(draft: Draft, selection: Node) -> tuple[str, ...]:
    """The buffer of these."""
    return tuple(f"sinks_{text.safe(name)}" for name in order(draft, selection))


def sort(draft: Draft, node: Node, op: Permute) -> None:
    """Weigh keys, and sort each segment."""
    assert op.segment is not None, "refused"
    shape, level = draft.shape, text.safe(node.name)
    contexts = _contexts(draft, node, op)
    weights, slots, keys = f"weights_{level}", text.buffer(node.name), f"keys_{level}"
    parts, totals = f"parts_{level}", f"totals_{level}"
    heads, sequences = str(shape.kv_heads), "batch.sequences"
    k, first, first_of = draft.tensor(node.inputs[0]), contexts[-1], contexts[0].name
    source = text.input_of(node.inputs[0])
    sinks = (f"sinks_{level}",) if first.sinks else ()
    buffers = [
        Buffer(name=weights, dtype="f32", dims=(sequences, heads, keys), role="list"),
        Buffer(
            name=slots,
            dtype="i32",
            dims=(f"{source}.shape[0]", heads, f"{source}.shape[1]"),
            role="list",
        ),
    ]
    for name in sinks:
        shape_of = (sequences, heads, str(first.sinks))
        buffers.append(Buffer(name=name, dtype="i32", dims=shape_of, role="list"))
    launches: list[Launch] = []
    for context in contexts:
        draft.kernel("sorting", context, config(context, draft.dtype), node.name)
        grid, arguments = "", tuple[str, ...]()
        match context.how:
            case "totals":
                grid, arguments = (
                    f"{parts} * tiles_{level}",
                    (
                        *draft.tensor(node.inputs[1]),
                        *k,
                        totals,
                        parts,
                    ),
                )
                dims = (sequences, heads, parts, "2", str(context.judges))
                buffers.append(Buffer(name=totals, dtype="f32", dims=dims, role="list"))
            case "masses":
                grid = f"{keys} // {{BLOCK_N}} + 1"
                arguments = (*draft.tensor(node.inputs[1]), *k, totals, parts, weights, keys)
            case "means":
                grid, arguments = f"{keys} // {op.segment} + 1", (*k, weights, keys)
            case "sort":
                grid = f"{keys} // {op.segment} + 1"
                arguments = (weights, keys, *sorting.arguments(slots), *sinks)
            case "around":
                raise AssertionError("of masses that no order follows from")
        launches.append(
            Launch(
                kernel=context.name,
                grid=(grid, heads, sequences),
                arguments=(*arguments, *text.SEQ),
            )
        )
    part: tuple[tuple[str, str], ...] = ()
    if op.by == "mass":
        tile = f'config["{first_of}"]["BLOCK_T"]'
        part = (
            (parts, f"{keys} // {sorting.PART} + 1"),
            (f"step_{level}", tile),
            (f"tiles_{level}", f"({first.judges} + step_{level} - 1) // step_{level}"),
        )
    draft.steps.append(
        Step(
            title=f"sort: {op.level}",
            needs=node.inputs,
            makes=(node.name,),
            sizes=((keys, "max(1, batch.keys)"), *part),
            buffers=tuple(buffers),
            launches=tuple(launches),
        )
    )


def _contexts(draft: Draft, node: Node, op: Permute) -> tuple[SortingContext, ...]:
    """What weighs, and what sorts."""
    users = [x.op for x in draft.graph.users(node.name)]
    chosen = [x for x in users if isinstance(x, Select | SelectSet)]
    shape, level = draft.shape, op.level

    def context(name: str, how: sorting.How) -> SortingContext:
        return SortingContext(
            name=f"{name}_{level}",
            how=how,
            heads=shape.kv_heads,
            group=shape.group,
            head_dim=shape.qk,
            segment=op.segment or 0,
            last=op.last or 0,
            stride=chosen[0].stride if chosen else 1,
            sinks=max((x.sink or 0 for x in chosen), default=0),
            precision=shape.precision,
        )

    if op.by == "mass":
        return context("totals", "totals"), context("weigh", "masses"), context("sort", "sort")
    return context("weigh", "means"), context("sort", "sort")


def config(context: SortingContext, dtype: DType) -> Config:
    """Three-pass TF32 holds what it multiplies twice."""
    tile = 32 if dtype == "fp32" else 64
    match context.how:
        case "totals":
            values, warps, stages = {"BLOCK_T": tile, "BLOCK_N": tile}, 4, 3
        case "masses":
            values, warps, stages = {"BLOCK_T": tile, "BLOCK_N": tile}, 4, 2
        case "around":
            values, warps, stages = {"BLOCK_N": 256}, 4, 1
        case "means":
            values, warps, stages = {"BLOCK_N": min(64, next_power(context.segment))}, 4, 1
        case "sort":
            values, warps, stages = {}, max(1, min(8, context.padded // 128)), 1
    return Config(constexprs=tuple(values.items()), num_warps=warps, num_stages=stages)
