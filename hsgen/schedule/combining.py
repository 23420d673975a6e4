"""Launches that combine branches."""

from __future__ import annotations

from hsgen.graph import (
    Attend,
    Node,
)
from hsgen.kernels import (
    MergeContext,
)
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import text
from hsgen.schedule.draft import Draft


def gate(draft: Draft, node: Node) -> None:
    branches = [draft.graph[name] for name in node.inputs[1:]]
    names = tuple(b.op.branch for b in branches if isinstance(b.op, Attend))
    context = MergeContext(
        name="merge", heads=draft.shape.query_heads, head_dim=draft.shape.v, branches=names
    )
    config = Config(constexprs=(("BLOCK_R", 32),), num_warps=4, num_stages=1)
    kernel = draft.kernel("merge", context, config, node.name)
    gates = text.input_of(node.inputs[0])
    output = text.buffer(node.name)
    items = f"batch.rows * {draft.shape.query_heads}"
    draft.steps.append(
        Step(
            title="combine: gates",
            needs=node.inputs,
            makes=(node.name,),
            buffers=(
                Buffer(
                    name=output,
                    dtype="input",
                    dims=(
                        "in_q.shape[0]",
                        "in_q.shape[1]",
                        str(draft.shape.query_heads),
                        str(draft.shape.v),
                    ),
                    role="output",
                ),
            ),
            launches=(
                Launch(
                    kernel=kernel,
                    grid=(f"({items} + {{BLOCK_R}} - 1) // {{BLOCK_R}}", "1"),
                    arguments=(
                        gates,
                        *(f"{gates}.stride({i})" for i in range(4)),
                        *(text.buffer(name) for name in node.inputs[1:]),
                        output,
                        "in_q.shape[1]",
                        "batch.rows",
                    ),
                ),
            ),
        )
    )
