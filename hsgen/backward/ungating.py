"""The launch that goes back through an output's gate, before all branches."""

from __future__ import annotations

from hsgen.backward.gathered import GATED, GRAD_O, Gradients
from hsgen.graph import OutputGate
from hsgen.kernels import UngateContext
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import text


def ungate(made: Gradients) -> None:
    """The gradients of an output's gate, if it has one, and of what was gated."""
    draft = made.draft
    node = draft.graph[draft.graph.outputs.o]
    if not isinstance(node.op, OutputGate):
        return
    gate, heads = node.inputs[0], str(draft.shape.query_heads)
    buffers, _ = made.buffer(gate)
    context = UngateContext(name="ungate_output", head_dim=draft.shape.v, each=node.op.each)
    config = Config(constexprs=(("BLOCK_R", 16),), num_warps=4, num_stages=1)
    draft.kernel("merge", context, config, node.name)
    dims = ("in_q.shape[0]", "in_q.shape[1]", heads, str(draft.shape.v))
    read = (text.buffer(node.name), GRAD_O, text.input_of(gate), GATED, made.buffers[gate])
    draft.steps.append(
        Step(
            title="back through the output's gate",
            needs=("q", gate),
            makes=(node.name,),
            buffers=(*buffers, Buffer(name=GATED, dtype="input", dims=dims, role="scratch")),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=("batch.rows // {BLOCK_R} + batch.sequences", heads),
                    arguments=(*(x for name in read for x in text.strides(name)), *text.SEQ),
                ),
            ),
        )
    )
