"""Graph, Target -> Plan: which operators share a launch, in which skeleton, with which buffers and tiles.

The only stage that decides on launches.  Values that tuning varies are a kernel's Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import networkx as nx

from hsgen import (
    appending,
    estimates,
    foretold,
    keeping,
    maps,
    passes,
    patterns,
    refusals,
    runs,
    slashes,
    takes,
    walks,
)
from hsgen.configs import DType
from hsgen.errors import PlanError
from hsgen.graph import (
    Assign,
    Attend,
    Carry,
    Cluster,
    Delta,
    Distance,
    Divergence,
    Entropies,
    Gate,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
    OutputGate,
    Permute,
    Pool,
    PoolHeads,
    PoolRows,
    Recall,
    Reduce,
    ReduceRows,
    Rotate,
    Round,
    Route,
    Runs,
    Score,
    Select,
    SelectSet,
    Switch,
    Union,
    Unlike,
)
from hsgen.plan import Cached, Plan
from hsgen.schedule import (
    attending,
    biased,
    choosing,
    clustering,
    combining,
    cutting,
    descending,
    estimating,
    foretelling,
    laid,
    likening,
    mapping,
    slashing,
    sorted_keys,
    staying,
    taking,
    text,
    vectors,
    walking,
)
from hsgen.schedule.choosing import part_of
from hsgen.schedule.draft import (
    LATENT_DIMS,
    SCRATCH_BYTES,
    SORT_LIMIT,
    TILE_OF_HEADS,
    Draft,
    Order,
)
from hsgen.storage import Storage, storage_of
from hsgen.target import Target

__all__ = [
    "LATENT_DIMS",
    "SCRATCH_BYTES",
    "SORT_LIMIT",
    "TILE_OF_HEADS",
    "Order",
    "choose_again",
    "part_of",
    "schedule",
]


def schedule(
    graph: Graph,
    target: Target,
    dtype: DType = "bf16",
    orders: Mapping[str, Order] | None = None,
    cached: Cached | None = None,
    *,
    apart: bool = False,
) -> Plan:
    """Plan every launch of a spec for one GPU.

    Args:
        graph: verified and passed; heads and head dims bound.
        target: the GPU.
        dtype: of the caller's tensors; it decides tile sizes, not the kernels' text.
        orders: by branch, whether rows stay and blocks come to them, or blocks stay and rows come; of
            branches over blocks that each query head chose for itself.
        cached: that keys come from a cache, which keeps the entries of levels too; None: from the caller.
        apart: that outputs of gated branches are kept, each for its gradient, and weighed at the end.

    Raises:
        PlanError: an operator that no kernel does yet, a size that none can hold, or an order of a branch
            that has but one.
    """
    graph, merged = patterns.routed(passes.without_losses(graph))
    for join in (slashes.joined, foretold.joined, takes.joined):
        graph, beside = join(graph)
        merged = {**merged, **beside}
    draft = Draft(graph, target, dtype, orders or {}, kept=apart, cached=cached, merged=merged)
    return _plan(draft)


def _plan(draft: Draft) -> Plan:
    storage = storage_of(draft.graph) if draft.cached else None
    _refuse(draft)
    _require_branches(draft)
    laid.begin(draft)
    vectors.means_of_tiers(draft)
    draft.turns = {} if draft.kept else combining.turns(draft.graph)
    draft.becomes = {} if draft.kept else {**combining.becomes(draft), **taking.becomes(draft)}
    _append(draft, storage)
    _launches(draft)
    vectors.pools_beside(draft)
    laid.in_slots(draft)
    kept = combining.weigh(draft) if draft.kept or combining.by_channel(draft.graph) else {}
    combining.gate_output(draft)
    _leave_out(draft)
    alone = slashing.alone(draft) or foretelling.alone(draft)
    outputs = draft.graph.outputs
    return Plan(
        name=draft.graph.meta.name,
        target=draft.target.label,
        dtype=draft.dtype,
        inputs=tuple(
            (n.name, n.type.dims)
            for n in draft.graph.nodes()
            if isinstance(n.op, Input) and n.op.role != "state"  # which comes as a selection
        ),
        kernels=tuple(draft.kernels),
        steps=tuple(combining.in_turn(draft)),
        scratch_bytes=SCRATCH_BYTES,
        output=text.buffer(outputs.o),
        lse={branch: text.buffer(name) for branch, name in outputs.lse.items()},
        selection={level: text.buffer(name) for level, name in outputs.selection.items()},
        brought={
            text.buffer(node.name): node.type.dims
            for node in draft.graph.nodes()
            if isinstance(node.op, Recall)
        },
        gates=combining.gates(draft.graph),
        sizes=dict(draft.graph.sizes),
        apart=kept if draft.kept else {},
        cached=draft.cached,
        storage=storage,
        appends=tuple(draft.appends),
        alone=alone,
    )


def _launches(draft: Draft) -> None:
    """What each node needs; of what combines branches only that which they do themselves."""
    for node in draft.graph.nodes():
        _launch(draft, node)


def choose_again(draft: Draft, chosen: set[str], together: set[str]) -> None:
    """The launches of choices as a forward has them; of those `together` rows have no lists of their own."""
    behind = chosen.union(*(nx.ancestors(draft.graph.digraph, name) for name in chosen))
    for node in draft.graph.nodes():
        if node.name in behind:
            _launch(draft, node)
    spread = [step for step in draft.steps if step.of == "rows" and together & set(step.makes)]
    launched = {launch.kernel for step in spread for launch in step.launches}
    draft.steps = [step for step in draft.steps if step not in spread]
    draft.kernels = [kernel for kernel in draft.kernels if kernel.name not in launched]


def _launch(draft: Draft, node: Node) -> None:
    if _launched(draft, node):
        return
    match node.op:
        case Permute():
            sorted_keys.sort(draft, node, node.op)
        case Pool() | PoolRows() | Rotate() | Round():
            vectors.make(draft, node, node.op)
        case Attend():
            attending.attend(draft, node, node.op)
        case Select() | SelectSet():
            _choose(draft, node, node.op)
        case LogSumExp() if _summed_apart(draft.graph, node):
            attending.log_sum_exp(draft, node)
        case Input() | Score() | LogSumExp() | Normalise() | Reduce() | Map() | Gate() | Union():
            pass  # fused into the launch that reads them
        case Norm() | OutputGate() | Divergence() | Entropies() | Recall(width=int()):
            pass  # fused into what makes what they read; behind all; calls of their own; the caller's
        case Unlike():
            likening.compare(draft, node, node.op)
        case (
            Route()
            | Switch()
            | Cluster()
            | Assign()
            | Runs()
            | Delta()
            | PoolHeads()
            | Recall()
            | Carry()
            | Distance()
            | ReduceRows()
        ):
            raise AssertionError("refused")


def _launched(draft: Draft, node: Node) -> bool:
    """Whether a node is part of what is done as a whole, which is launched where one of its nodes is met."""
    graph, name = draft.graph, node.name
    if maps.way_to(graph, name) or keeping.way_to(graph, name) or walks.read_in_place(graph, node):
        return True
    if (way := estimates.way_to(graph, name)) and name in way.inside:
        return True
    wholes = (clustering.launched, descending.launched, slashing.launched, foretelling.launched)
    some = (laid.launched, *wholes, cutting.launched, taking.launched)
    return any(launched(draft, node) for launched in some)


def _leave_out(draft: Draft) -> None:
    """Where all is attended whatever is chosen, a call chooses only if somebody asks for that."""
    graph = draft.graph
    outputs = {graph.outputs.o, *graph.outputs.lse.values()}
    behind = outputs.union(*(nx.ancestors(graph.digraph, name) for name in outputs))
    chosen = {name for name in graph.outputs.selection.values() if name not in behind}
    if not chosen or len(chosen) < len(graph.outputs.selection):
        return
    made = {name for step in draft.steps for name in step.makes if name in behind}
    draft.steps = [
        step if step.of or made.intersection(step.makes) else replace(step, of="rows")
        for step in draft.steps
    ]


def _choose(draft: Draft, node: Node, op: Select | SelectSet) -> None:
    """The launches of a choice."""
    if isinstance(op, SelectSet) and walks.walked(draft.graph, node):
        walking.choose(draft, node, op)
        return
    if isinstance(op, SelectSet) and (estimated := estimates.way_to(draft.graph, node.name)):
        estimating.select(draft, node, op, estimated)
        return
    if isinstance(op, SelectSet) and keeping.way_to(draft.graph, node.inputs[0]):
        staying.choose(draft, node, op)
        return
    if isinstance(op, Select) and (way := runs.way_to(draft.graph, node.name)):
        cutting.select(draft, node, op, way)
        return
    if way := maps.way_to(draft.graph, node.inputs[0]):
        mapping.select(draft, node, op, way)
    elif isinstance(op, Select) and refusals.by_bias(draft.graph, node):
        biased.select(draft, node, op)
    else:
        choosing.select(draft, node, op)


def _summed_apart(graph: Graph, node: Node) -> bool:
    """Whether a log-sum-exp is of scores, and not made where masses are held against a threshold."""
    held = all(refusals.held_masses(graph, user) for user in graph.users(node.name))
    return isinstance(graph[node.inputs[0]].op, Score) and not held


def _append(draft: Draft, storage: Storage | None) -> None:
    """What comes before pools where there is a cache: lengths, and the new tokens."""
    if storage is not None:
        kernels, steps = appending.plan(storage, draft.page, few=draft.steps_alone)
        draft.kernels += kernels
        draft.appends += steps


def _refuse(draft: Draft) -> None:
    """Operators that no kernel does yet, and sizes that none holds."""
    refusals.refuse(draft.graph)
    for name in ("Hq", "Hkv", "Dqk", "Dv"):
        if name not in draft.graph.sizes:
            raise PlanError(
                f"{name} is not known: give `heads` and `head_dim` in the spec or to load_kernel"
            )
    attends = [node.op for node in draft.graph.nodes() if isinstance(node.op, Attend)]
    if draft.cached is not None:
        _require_reached(draft.graph)
    wide = LATENT_DIMS if all(op.latent for op in attends) else 256
    for name, most in (("Dqk", wide), ("Dv", wide), ("Di", 256)):
        dim = draft.graph.sizes.get(name, 16)
        if dim % 16 or not 16 <= dim <= most:
            raise PlanError(
                f"head dim {name}: expected a multiple of 16 from 16 to {most}, got {dim}"
            )


def _require_reached(graph: Graph) -> None:
    """What no kernel does yet of keys in a cache."""
    for node in graph.nodes():
        if isinstance(node.op, Attend) and node.op.spans is not None:
            words = "no kernel attends spans of keys in a cache yet"
            raise PlanError(f"branch {node.op.branch}: {words}", span=node.span)
        if isinstance(node.op, Attend) and node.op.biased:
            words = "no kernel adds a learned bias to logits of keys in a cache yet"
            raise PlanError(f"branch {node.op.branch}: {words}", span=node.span)
        if isinstance(node.op, Score) and node.op.form == "bias":
            words = "no kernel chooses by a learned bias in a cache yet"
            raise PlanError(f"level {node.op.level}: {words}", span=node.span)


def _require_branches(draft: Draft) -> None:
    """Orders are of branches that attend to blocks."""
    attends = [n.op for n in draft.graph.nodes() if isinstance(n.op, Attend)]
    blocks = [op.branch for op in attends if op.over == "blocks"]
    if wrong := sorted(draft.orders.keys() - set(blocks)):
        raise PlanError(
            f"orders: no branch over blocks is called {', '.join(wrong)}",
            help=f"branches over blocks: {', '.join(blocks) or 'none'}",
        )
