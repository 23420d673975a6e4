"""Level by level, branch by branch."""

from __future__ import annotations

from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.graph import Graph, Meta, Node, verify
from hsgen.planner.branches import plan_branch, plan_combine
from hsgen.planner.builder import Builder, some
from hsgen.planner.calls import brought, carried, plan_reuse
from hsgen.planner.orders import assign, lies_in
from hsgen.planner.routes import taken
from hsgen.planner.scores import plan_map, plan_score
from hsgen.planner.selections import select, select_operands, select_set, unlike


def plan(spec: language.Spec) -> Graph:
    """The operators of a spec, one a node, verified.

    Heads and head dims that the spec leaves open stay names without sizes.

    Raises:
        SpecError: the spec, made in Python, breaks rules of the language.
        PlanError: the graph has no operators for it yet.
    """
    builder = Builder(spec=language.verify(spec))
    made: dict[str, Node] = {}
    computed = spec.route is not None and spec.route.statistic is not None
    for branch in spec.attend:
        # chosen by position alone: levels may ask for its log-sum-exp
        if branch.over is None and not (computed and branch.when):
            made[branch.name] = plan_branch(builder, branch)
    needed = _levels(spec)
    for level in spec.levels:
        if level.name in needed:
            _plan_level(builder, level)
    for branch in spec.attend:
        if branch.name not in made:
            made[branch.name] = plan_branch(builder, branch)
    branches = [made[branch.name] for branch in spec.attend]
    outputs = plan_combine(builder, branches)
    graph = Graph.build(
        builder.nodes.values(), outputs=outputs, sizes=_sizes(spec), meta=_meta(spec)
    )
    return verify(graph)


def without_losses(spec: language.Spec) -> language.Spec:
    """The spec as if it had no loss, which no call computes, unless a loss has a choice of its own."""
    if spec.loss is None:
        return spec
    alone = spec.model_copy(update={"loss": None})
    same = plan(alone).outputs.selection.keys() == plan(spec).outputs.selection.keys()
    return alone if same else spec


def _levels(spec: language.Spec) -> frozenset[str]:
    """The levels that a call has to do with: what is brought needs no level of its own."""
    given = {reuse.level for reuse in spec.reuse if reuse.brought}
    if not given:
        return frozenset(level.name for level in spec.levels)
    needed = {branch.over for branch in spec.attend}
    if spec.loss and spec.loss.kl:
        needed.add(spec.loss.kl.level)
    if spec.route and spec.route.statistic:
        needed |= {*spec.route.statistic.levels}
    for level in reversed(spec.levels):
        if level.name in needed - given:
            needed |= level.named
    return frozenset(level.name for level in spec.levels if level.name in needed)


def _sizes(spec: language.Spec) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if spec.heads is not None:
        sizes |= {"Hq": spec.heads.query, "Hkv": spec.heads.kv, "G": spec.heads.group}
    if spec.head_dim is not None:
        sizes |= {"Dqk": spec.head_dim.qk, "Dv": spec.head_dim.v}
    if spec.index is not None:
        sizes |= {"Hi": spec.index.heads, "Di": spec.index.dim}
    return sizes


def _meta(spec: language.Spec) -> Meta:
    return Meta(name=spec.name, source=spec.source, causal=spec.causal, digest=spec.digest)


def _refuse(builder: Builder, level: language.Level) -> None:
    """What the language and the reference know of searched and assigned entries, and the graph does not.

    Raises:
        PlanError: what calls hand on or learn from, walks and weights are of entries that lie in place.
    """
    kinds = language.LearnedTree | language.Ragged | language.Stripes | language.Halving
    if not isinstance(level.partition, kinds):
        return
    kl, select = builder.spec.loss and builder.spec.loss.kl, level.select
    lacks = (
        ("reuse", builder.spec.reuse_of(level.name) is not None),
        ("loss", kl is not None and kl.level == level.name),
        ("early_stop", select is not None and select.early_stop is not None),
        ("quota", select is not None and select.quota is not None),
        ("sink", select is not None and select.force.sink is not None),
        ("log_count", level.score.bias == "log_count"),
        ("pooling_error", level.score.form == "pooling_error"),
    )
    for what, lacking in lacks:
        if lacking:
            message = f"level {level.name}: the graph has no {what} of '{level.partition.kind}' yet"
            at = builder.spec.span(what) if what in ("reuse", "loss") else None
            raise PlanError(message, span=at or builder.place(level, "partition"))


def _plan_level(builder: Builder, level: language.Level) -> None:
    _refuse(builder, level)
    if brought(builder, level):
        return
    assign(builder, level)
    parent = builder.selections[level.within] if level.within else None
    if level.score.source is None:
        score = plan_score(builder, level, parent)
    else:
        score = plan_map(builder, level, builder.spec.level(level.score.source))
    builder.scores[level.name] = score
    if level.select is not None:
        cut, held = lies_in(builder, level)
        op = (
            select_set(level, level.select, cut)
            if level.select.counts_vary
            else select(builder.spec, level, level.select, cut)
        )
        operands = [score, *some(parent)]
        if level.select.force.level:
            operands.append(builder.selections[level.select.force.level])
        if level.select.budget_from:
            operands.append(builder.selections[level.select.budget_from])
        if level.select.apart:
            operands.append(builder.input(f"{level.name}_split", "split", "Z", dtype="i32"))
        at = builder.place(level, "select")
        operands += unlike(builder, level)
        operands += select_operands(builder, level, held)
        operands += taken(builder, level.when)
        operands[0] = carried(builder, level, score)
        selection = builder.add(f"{level.name}.selection", op, *operands, at=at)
        builder.selections[level.name] = selection
        plan_reuse(builder, level, selection)
