"""Graph, Target -> Plan of the losses of a spec, and of their gradients: programs of their own.

A KL makes scores and what attention gives again, a turn of rows at a time, so that memory grows with the rows
of a turn times the keys, not with all rows.  What was chosen comes as it was chosen.
"""

from __future__ import annotations

from hsgen import refusals
from hsgen.configs import DType
from hsgen.errors import PlanError
from hsgen.graph import Distance, Divergence, Entropies, Graph, Input
from hsgen.losses import apart, gate, index, trees
from hsgen.plan import Plan
from hsgen.schedule import SCRATCH_BYTES, text
from hsgen.schedule.draft import Draft
from hsgen.target import Target

__all__ = ["SCRATCH_BYTES", "plan"]


def plan(graph: Graph, target: Target, dtype: DType = "bf16", *, gradients: bool = False) -> Plan:
    """Plan every launch of a spec's losses for one GPU.

    Args:
        graph: verified and passed; heads and head dims bound.
        target: the GPU.
        dtype: of the caller's tensors.
        gradients: those of what the losses teach too.

    Raises:
        PlanError: a loss that no kernel computes yet.
    """
    found = [graph[name] for name in graph.outputs.loss.values()]
    assert found, "a spec that has losses"
    for node in found:
        if words := refusals.lacking(graph, node):
            raise PlanError(words, span=node.span)
    if len(found) > 1:
        raise PlanError("losses have kernels one by one, not together", span=found[1].span)
    (node,) = found
    draft = Draft(graph, target, dtype, whole=True)
    match node.op:
        case Divergence() as op if refusals.gate_of(graph, node) is not None:
            made = gate.divergence(draft, node, op, gradients=gradients)
        case Divergence() as op:
            made = index.divergence(draft, node, op, gradients=gradients)
        case Entropies() as op:
            made = trees.entropies(draft, node, op, gradients=gradients)
        case Distance() as op:
            made = apart.distance(draft, node, op, gradients=gradients)
        case _:
            raise AssertionError("refused")
    outputs, sides = graph.outputs, apart.SIDES if isinstance(node.op, Distance) else ()
    looked_at = {x for node in found for x in (*node.inputs, *graph[node.inputs[0]].inputs)}
    read = {level: name for level, name in outputs.selection.items() if name in looked_at}
    return Plan(
        name=f"{graph.meta.name}_losses",
        target=target.label,
        dtype=dtype,
        inputs=tuple(
            (n.name, n.type.dims)
            for n in graph.nodes()
            if isinstance(n.op, Input) and n.op.role != "state"
        )
        + tuple((side, ("B", "T", "Hq", "Dv")) for side in sides),
        kernels=tuple(draft.kernels),
        steps=tuple(draft.steps),
        scratch_bytes=SCRATCH_BYTES,
        output=text.buffer(outputs.o),
        lse={},
        selection={level: text.buffer(name) for level, name in read.items()},
        brought={
            text.buffer(name): (*graph[name].type.dims[:3], str(draft.width(graph[name])))
            for name in read.values()
        },
        sizes=dict(graph.sizes),
        gradients=made,
        losses={name: f"rows_of_{name}" for name in outputs.loss},
    )
