"""Graph, Target -> Plan of the gradients: dq where rows stay, dk and dv where keys stay.

A program of its own, compiled when a call first needs it; the forward knows nothing of it.  Selections are
constants: they come as they were made, and nothing is chosen again, but for what all rows have one list of,
and tiers of a pyramid, which no selection says.
"""

from __future__ import annotations

from collections.abc import Mapping

from hsgen import clusters, foretold, passes, patterns, refusals, slashes
from hsgen.backward import again, attending, clustering, laid, ordering, pooling, refusing, ungating
from hsgen.backward.gathered import Gradients
from hsgen.configs import DType
from hsgen.graph import Attend, Graph, Input
from hsgen.plan import Plan
from hsgen.schedule import SCRATCH_BYTES, combining, text, vectors
from hsgen.schedule import laid as scheduled
from hsgen.schedule.draft import Draft
from hsgen.target import Target

__all__ = ["chooses_again", "keeps_branches", "lacking", "plan"]

lacking = refusing.lacking


def keeps_branches(graph: Graph) -> bool:
    """Whether a forward that autograd records keeps the outputs of its branches: where gates weigh them."""
    return combining.gates(graph) is not None


def chooses_again(graph: Graph) -> bool:
    """Whether a backward makes a call's own choice once more, so that no list of a row is kept for it."""
    if again.chooses(graph) or clusters.clustering_of(graph) is not None:
        return True
    return bool(again.repeated(patterns.routed(passes.without_losses(graph))[0]))


def plan(graph: Graph, target: Target, dtype: DType = "bf16", *, apart: bool = False) -> Plan:
    """Plan every launch of a spec's gradients for one GPU.

    Args:
        graph: verified and passed; heads and head dims bound.
        target: the GPU.
        dtype: of the caller's tensors.
        apart: the forward kept the outputs of gated branches, which tell delta.

    Raises:
        PlanError: something whose gradient no kernel makes yet.
    """
    graph, _ = patterns.routed(passes.without_losses(graph))
    for join in (slashes.joined, foretold.joined):
        graph, _ = join(graph)
    refusals.refuse(graph)
    refusing.refuse(graph)
    draft = Draft(graph, target, dtype)
    draft.turns = combining.turns(graph)
    made = Gradients(draft, apart=apart)
    scheduled.begin(draft)
    clustered = clusters.clustering_of(graph)
    chosen, repeated = tuple[str, ...](), tuple[str, ...]()
    if clustered is None and draft.tiling is None and not again.chooses(graph):
        made.repeated = again.repeated(graph)
    selection = {} if again.alone(graph) else _read(graph, graph.outputs.selection)
    if clustered is not None:
        chosen = clustering.plan(made, clustered)
    elif draft.tiling is not None:
        laid.plan(made)
    else:
        chosen = again.repeat(draft, made.repeated)
        ungating.ungate(made)
        vectors.means_of_tiers(draft)
        chosen = (*chosen, *again.choose(draft))
        pooling.pool_again(draft)
        repeated = ordering.sort_again(draft)
        for node in draft.graph.nodes():
            if isinstance(node.op, Attend):
                attending.attend(made, node, node.op)
        pooling.unpool(made)
    outputs = graph.outputs
    return Plan(
        name=graph.meta.name,
        target=target.label,
        dtype=dtype,
        inputs=tuple((n.name, n.type.dims) for n in graph.nodes() if _is_tensor(n.op)),
        kernels=tuple(draft.kernels),
        steps=tuple(draft.steps),
        scratch_bytes=SCRATCH_BYTES,
        output=text.buffer(outputs.o),
        lse={branch: text.buffer(name) for branch, name in outputs.lse.items()},
        selection=selection,
        sizes=dict(graph.sizes),
        gradients=made.buffers,
        apart=made.outputs,
        again=(*chosen, *repeated),
    )


def _is_tensor(op: object) -> bool:
    return isinstance(op, Input) and op.role != "state"


def _read(graph: Graph, selection: Mapping[str, str]) -> dict[str, str]:
    """Selections that a branch attends."""
    attended = {
        name for node in graph.nodes() if isinstance(node.op, Attend) for name in node.inputs
    }
    return {level: text.buffer(name) for level, name in selection.items() if name in attended}
