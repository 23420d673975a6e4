"""The gradients of a plan while they grow: which tensors have one, and who comes first."""

from __future__ import annotations

from dataclasses import dataclass, field

from hsgen.graph import OutputGate, Pool
from hsgen.plan import Buffer
from hsgen.schedule import text
from hsgen.schedule.draft import Draft

GRAD_O = "grad_o"  # of the output, as it comes
GATED = "grad_gated"  # of what an output's gate is times


@dataclass(slots=True)
class Gradients:
    """Buffers of gradients; who comes first stores, others add.

    buffers: by tensor of the caller.  levels: by what is pooled, in float32.  deltas: that have one.
    apart: the forward kept the outputs of branches under gates.  outputs: these, by branch.
    repeated: selections that are made again where a caller brings none.
    """

    draft: Draft
    apart: bool = False
    repeated: frozenset[str] = frozenset()
    outputs: dict[str, str] = field(default_factory=dict[str, str])
    buffers: dict[str, str] = field(default_factory=dict[str, str])
    levels: dict[str, str] = field(default_factory=dict[str, str])
    deltas: set[str] = field(default_factory=set[str])

    @property
    def grad_o(self) -> str:
        """The gradient of what branches made together."""
        return GATED if self.output_gated else GRAD_O

    @property
    def output_gated(self) -> bool:
        graph = self.draft.graph
        return isinstance(graph[graph.outputs.o].op, OutputGate)

    def buffer(self, name: str) -> tuple[tuple[Buffer, ...], bool]:
        """The gradient of a tensor, brought to life where it is new, and whether it is added to."""
        if name in self.buffers or name in self.levels:
            return (), True
        pool = self.draft.pool_of(name)
        made = f"grad_{text.safe(name)}"
        source = self.draft.graph[pool.inputs[0] if pool else name]
        x = text.input_of(source.name)
        dims = [f"{x}.shape[{i}]" for i in range(len(source.type.dims))]
        if pool:
            self.levels[name] = made
            assert isinstance(pool.op, Pool)
            dims = [*dims[:-2], dims[-1]] if pool.op.series else dims
            dims[1] = f"length_{text.safe(name)}"
        else:
            self.buffers[name] = made
        # zeros: no program has a key that is past its sequence's end
        dtype = "f32" if pool else "input"
        role = "scratch" if pool else "output"
        return (Buffer(name=made, dtype=dtype, dims=tuple(dims), role=role, zeros=True),), False

    def grad(self, name: str) -> tuple[str, ...]:
        """The gradient of keys or values with its batch, token and head strides."""
        if name in self.buffers:
            return text.strides(self.buffers[name])
        return (self.levels[name], *self.draft.tensor(name)[1:])  # laid out as the level is
