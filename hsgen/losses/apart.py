"""The launch of a distance of two outputs, which calls of the two branches made before."""

from __future__ import annotations

from hsgen.graph import Distance, Node
from hsgen.learn import DistanceContext
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import combining, text
from hsgen.schedule.draft import Draft

SIDES = ("student", "teacher")  # what the driver calls the two outputs


def distance(draft: Draft, node: Node, op: Distance, *, gradients: bool) -> dict[str, str]:
    """Its launch.  -> buffers of gradients by side

    Outputs that gates weighed are read by nothing else: a branch's delta is of its own, or made again.
    Slopes then lie where they lay.
    """
    gated = combining.gates(draft.graph) is not None
    loss = node.name.removeprefix("loss.")
    heads, dim = draft.shape.query_heads, draft.shape.v
    both = op.toward == "both"
    context = DistanceContext(
        name=f"distance_{loss}",
        form=op.form,
        both=both,
        heads=heads,
        dim=dim,
        derives=gradients,
    )
    config = Config(constexprs=(("BLOCK_R", 64),), num_warps=4, num_stages=1)
    draft.kernel("learn", context, config, node.name)
    inputs = tuple(text.input_of(side) for side in SIDES)
    sides = SIDES[: 1 + both] if gradients else ()
    made = {side: text.input_of(side) if gated else f"grad_{side}" for side in sides}
    of = tuple(f"{inputs[0]}.shape[{i}]" for i in range(4))
    tiles = f"tiles_{loss}"
    draft.steps.append(
        Step(
            title=f"loss: {loss}",
            needs=SIDES,
            makes=(node.name,),
            sizes=((tiles, text.tiles_of(context.name).replace("BLOCK_T", "BLOCK_R")),),
            buffers=(
                *(
                    Buffer(name=name, dtype="input", dims=of, role="output", zeros=True)
                    for name in made.values()
                    if name not in inputs
                ),
                Buffer(
                    name=f"rows_of_{loss}",
                    dtype="f32",
                    dims=(f"{tiles} * {heads}", "2"),
                    role="output",
                    zeros=True,
                ),
            ),
            launches=(
                Launch(
                    kernel=context.name,
                    grid=(tiles, str(heads)),
                    arguments=(
                        *(x for name in (*inputs, *made.values()) for x in text.strides(name)),
                        f"rows_of_{loss}",
                        *text.SEQ,
                    ),
                ),
            ),
        )
    )
    return made
