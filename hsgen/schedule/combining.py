"""How branches become one output: in turn, each adds its own, times its gate, to the same buffer.

Under one softmax each goes on from the output and the log-sum-exp that are there.  A program owns its rows
and launches follow one another, so the sum has one order, in every run.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx

from hsgen import rows
from hsgen.graph import (
    Attend,
    Gate,
    Graph,
    Node,
    OutputGate,
    Select,
    SelectSet,
    Union,
    block_of,
)
from hsgen.kernels import OutputGateContext, WeighContext
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import laid, text
from hsgen.schedule.draft import Draft, Turn

LAST = 3  # stage of what all branches come before


def turns(graph: Graph) -> Mapping[str, Turn]:
    """By branch, its turn in the sum or the union; empty where neither gates nor one softmax combine."""
    total = _total(graph)
    if total is None or by_channel(graph):
        return {}
    branches = [x.name for x in graph.operands(total) if isinstance(x.op, Attend)]
    known = [node.name for node in graph.nodes() if node.name in branches]
    order = sorted(known, key=lambda name: _stage(graph, name))
    found: dict[str, Turn] = {}
    for i, name in enumerate(order):
        last, sink = name == order[-1], False
        if isinstance(total.op, Union):
            sink = last and bool(total.op.sink)
            how = rows.Joined(first=i == 0)
        else:
            how = rows.Gated(column=branches.index(name), branches=len(branches), first=i == 0)
        found[name] = Turn(
            reads=total.inputs[-1] if sink else gates(graph),
            total=total.name,
            before=order[i - 1] if i else None,
            last=last,
            how=how,
        )
    return found


def becomes(draft: Draft) -> Mapping[str, str]:
    """The branch of those weighed at the end that becomes their sum where it lies: no other reads it."""
    total = _total(draft.graph)
    if total is None or not by_channel(draft.graph):
        return {}
    branches = [x for x in draft.graph.operands(total) if isinstance(x.op, Attend)]
    by_row = [node.name for node in branches if not laid.is_coarse(draft, node)]
    return dict.fromkeys(by_row[:1], total.name)


def weigh(draft: Draft) -> Mapping[str, str]:
    """Branches that each wrote its own output become one at the end.  -> those outputs, by branch"""
    total = _total(draft.graph)
    assert total is not None, "asked of gated branches only"
    branches = [x for x in draft.graph.operands(total) if isinstance(x.op, Attend)]
    made = tuple(draft.output(node) for node in branches)
    coarse = tuple(i for i, node in enumerate(branches) if laid.is_coarse(draft, node))
    context = WeighContext(
        name="weigh_branches",
        head_dim=draft.shape.v,
        branches=len(branches),
        each="channel" if by_channel(draft.graph) else "head",
        kept=draft.wide,
        slots=draft.tiling.slots if draft.tiling else 0,
        coarse=coarse,
        heads=draft.shape.query_heads if coarse else 0,
    )
    given = text.input_of(total.inputs[0])
    read = (*made, *text.strides(given), f"{given}.stride(3)")
    _over_rows(draft, total, "weigh", context, read)
    if draft.tiling is not None:
        draft.steps.append(laid.over_slots(draft, draft.steps.pop(), [branches[i] for i in coarse]))
    names = [x.op.branch for x in branches if isinstance(x.op, Attend)]
    return dict(zip(names, made, strict=True))


def gate_output(draft: Draft) -> None:
    """Where the output has a gate, a launch behind all others: what branches made, times its sigmoid."""
    node = draft.graph[draft.graph.outputs.o]
    if not isinstance(node.op, OutputGate):
        return
    gate, made = node.inputs
    context = OutputGateContext(name="gate_output", head_dim=draft.shape.v, each=node.op.each)
    read = (*text.strides(text.buffer(made)), *text.strides(text.input_of(gate)))
    _over_rows(draft, node, "gate the output", context, read)
    laid.of_tokens(draft)


def _over_rows(
    draft: Draft,
    node: Node,
    title: str,
    context: WeighContext | OutputGateContext,
    read: tuple[str, ...],
) -> None:
    """A launch over rows and heads that writes an output.  `read`: its arguments before that."""
    heads = str(draft.shape.query_heads)
    config = Config(constexprs=(("BLOCK_R", 32),), num_warps=4, num_stages=1)
    draft.kernel("merge", context, config, node.name)
    dims = ("in_q.shape[0]", "in_q.shape[1]", heads, str(draft.shape.v))
    o = Buffer(name=text.buffer(node.name), dtype="input", dims=dims, role="output")
    there = o.name in read  # a branch brought it to life
    launch = Launch(
        kernel=context.name,
        grid=("batch.rows // {BLOCK_R} + batch.sequences", heads),
        arguments=(*read, *text.strides(o.name), *text.SEQ),
    )
    draft.steps.append(
        Step(
            title=title,
            needs=node.inputs,
            makes=(node.name,),
            buffers=() if there else (o,),
            launches=(launch,),
        )
    )


def by_channel(graph: Graph) -> bool:
    """Whether branches are weighed channel by channel, which is done at the end."""
    total = _total(graph)
    return total is not None and isinstance(total.op, Gate) and total.op.each == "channel"


def gates(graph: Graph) -> str | None:
    """The caller's tensor that weighs branches."""
    total = _total(graph)
    return total.inputs[0] if total is not None and isinstance(total.op, Gate) else None


def _total(graph: Graph) -> Node | None:
    return next((node for node in graph.nodes() if isinstance(node.op, Gate | Union)), None)


def in_turn(draft: Draft) -> list[Step]:
    """The steps, branches in the order of their turns."""
    total = draft.graph[draft.graph.outputs.o]

    def stage(step: Step) -> int:
        if draft.graph.outputs.o in step.makes and isinstance(total.op, OutputGate):
            return LAST
        return max((_stage(draft.graph, x) for x in step.makes if x in draft.turns), default=0)

    return sorted(draft.steps, key=stage)


def _stage(graph: Graph, branch: str) -> int:
    """When a branch can run: before a choice that reads its log-sum-exp, with the choice of blocks of rows,
    for which a caller's selection has another step, or behind all choices.
    """
    if any(
        isinstance(graph[name].op, Select | SelectSet)
        for name in nx.descendants(graph.digraph, branch)
    ):
        return 0
    chosen = [x for x in graph.operands(graph[branch]) if isinstance(x.op, Select | SelectSet)]
    return 1 if any(block_of(x.type.dims[1]) for x in chosen) else 2
