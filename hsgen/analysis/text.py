"""What `show` prints of a graph: its laws, inputs, operators, costs and totals."""

from __future__ import annotations

from hsgen.analysis.calls import calls_text
from hsgen.analysis.causality import causality, causality_text
from hsgen.analysis.costs import LENGTHS, at_most, costs, dense, must_move, total, unbound_sizes
from hsgen.analysis.laws import laws, not_dense_because, pooled_attends, recalls
from hsgen.analysis.polynomials import quantity
from hsgen.graph import (
    Graph,
    Input,
    Route,
    TensorType,
    align,
    anchors,
    befores,
    dump,
    partitions,
    tensor_inputs,
)


def describe(graph: Graph) -> str:
    """Everything the graph says, as text: laws, inputs, operators, costs where sizes are bound."""
    sections = [
        _header(graph),
        _laws_text(graph),
        _inputs_text(graph),
        ["graph", *_indent_dump(graph)],
    ]
    unbound = unbound_sizes(graph)
    if unbound:
        sections.append([f"costs: known once {', '.join(unbound)} are bound (heads, head_dim)"])
    else:
        sections += [_costs_text(graph), _totals_text(graph)]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _header(graph: Graph) -> list[str]:
    meta = graph.meta
    means = {
        "token": "row t depends on tokens up to t",
        "query_block": "row t depends on tokens up to the end of its query block",
        "prompt": "row t depends on statistics of the whole prompt",
        "none": "row t depends on every token",
    }
    title = f"{meta.name}, {meta.source}" if meta.source else meta.name
    return [title, f"causality: {causality_text(graph)} ({means[causality(graph)]})"]


def _laws_text(graph: Graph) -> list[str]:
    found = laws(graph)
    pooled = pooled_attends(graph)
    not_causal = f"causality is {causality_text(graph)}"
    rows = [
        ("every entry selected gives dense attention", not_dense_because(graph)),
        (
            "values that are not selected have no effect",
            f"branch {pooled[0]} attends pooled values" if pooled else None,
        ),
        (
            "tokens after t never change row t",
            None if found.future_never_changes_the_past else not_causal,
        ),
        (
            "decode step t equals row t of prefill",
            None
            if found.decode_equals_prefill_row
            else "a step takes over what earlier ones chose"
            if recalls(graph, over="steps")
            else not_causal,
        ),
    ]
    cells = [
        ("  yes" if why is None else "  no", law, f"({why})" if why else "") for law, why in rows
    ]
    return ["laws", *align(cells)]


def _inputs_text(graph: Graph) -> list[str]:
    cells = [
        (f"  {x.name}", _bound_text(graph, x.type, named=True), x.about)
        for x in tensor_inputs(graph)
    ]
    return ["inputs", *align(cells)]


def _bound_text(graph: Graph, type_: TensorType, *, named: bool = False) -> str:
    """A type with the sizes that are known in place of their names."""
    dims = [str(graph.sizes.get(dim, dim)) for dim in type_.dims]
    if named and type_.dims != tuple(dims):
        return f"[{', '.join(type_.dims)}] = [{', '.join(dims)}]"
    return f"[{', '.join(dims)}]" if named else f"{type_.dtype}[{', '.join(dims)}]"


def _indent_dump(graph: Graph) -> list[str]:
    """The operators of the dump; the inputs have a section of their own."""
    lines = dump(graph).splitlines()[1:]
    return [f"  {line}" for line in lines if "= input(" not in line]


def _costs_text(graph: Graph) -> list[str]:
    cells = [("  operator", "result", "FLOPs", "bytes")]
    found = costs(graph)
    cells += [
        (
            f"  %{node.name}",
            _bound_text(graph, node.type),
            str(found[node.name].flops),
            str(found[node.name].bytes),
        )
        for node in graph.nodes()
        if not isinstance(node.op, Input)
    ]
    early = befores(graph)
    start = max(cost.flops.start for cost in found.values())
    head = f"costs of each operator alone, batch 1, S = T >= {start}, 16-bit inputs"
    head += ", a call that chooses" if calls_text(graph) else ""
    entries = [
        f"N_{level} = {_entries_text(size - early.get(level, 0), stride, causal=graph.meta.causal)}"
        for level, (size, stride) in sorted(partitions(graph).items())
        if stride and level not in anchors(graph)
    ]
    entries += [
        f"N_{level} = floor(S^(1/{behind.power})) - {behind.first - 1}"
        for level, behind in sorted(anchors(graph).items())
    ]
    where = [f"  where {', '.join(entries)}"] if entries else []
    loose = ", ".join(f"%{name}" for name in at_most(graph))
    last = [f"  {loose}: at most, as if every token were kept"] if loose else []
    if any(isinstance(node.op, Route) for node in graph.nodes()):
        last.append(
            "  each way as if all took it; totals: the mean of a table, or the costliest way"
        )
    return [head, *align(cells), *where, *last]


def _entries_text(size: int, stride: int, *, causal: bool) -> str:
    if size == stride == 1:
        return "S"
    if size == stride:
        return f"S // {size}" if causal else f"ceil(S / {size})"
    return f"(S - {size}) // {stride} + 1"


def _totals_text(graph: Graph) -> list[str]:
    whole = total(graph)
    must, full = must_move(graph), dense(graph)
    cells = [
        ("  T", "FLOPs", "dense FLOPs", "dense / this", "bytes in and out", "bytes, each alone")
    ]
    for tokens in LENGTHS:
        flops, dense_flops = whole.flops.evaluate(tokens), full.flops.evaluate(tokens)
        cells.append(
            (
                f"  {tokens}",
                quantity(flops),
                quantity(dense_flops),
                f"{dense_flops / flops:.1f}x",
                quantity(must.evaluate(tokens)),
                quantity(whole.bytes.evaluate(tokens)),
            )
        )
    calls = calls_text(graph)
    return [f"totals against dense attention{', ' if calls else ''}{calls}", *align(cells)]
