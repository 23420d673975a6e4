"""Launches of a learned tree's dual entropy: vectors go down, tiles sum, and gradients of both sides."""

from __future__ import annotations

from itertools import accumulate

from hsgen.entropies import EntropiesContext, How, Side, Stage
from hsgen.graph import Entropies, Node
from hsgen.plan import Buffer, Config, Launch, Step
from hsgen.schedule import text
from hsgen.schedule.draft import Draft
from hsgen.trees import TreesContext

TOKENS = 256  # of a tile, whose shares are summed together
PARTS = 8  # of all tiles, at most, by which programs share a step of nodes
TOKENS_A_PART = (
    4096  # that a part has at least, for sums of nodes to be a small part of what a call is given
)


def entropies(draft: Draft, node: Node, op: Entropies, *, gradients: bool) -> dict[str, str]:
    """The launches of a dual entropy.  -> buffers of gradients by tensor"""
    tree = _Tree(draft, node, op)
    tree.walk()
    return tree.derive() if gradients else {}


class _Tree:
    """One tree's launches while they are planned."""

    def __init__(self, draft: Draft, node: Node, op: Entropies) -> None:
        self.draft, self.node, self.op = draft, node, op
        self.loss = node.name.removeprefix("loss.")
        self.queries, self.keys = node.inputs[0], node.inputs[1]
        self.centroids = node.inputs[2::3]
        counts = list(accumulate(op.branching, lambda a, b: a * b))
        firsts = [0, *accumulate(counts)]
        self.stages = tuple(
            Stage(index=i, nodes=counts[i], branching=each, first=firsts[i])
            for i, each in enumerate(op.branching)
        )
        self.heads = draft.size(draft.graph[self.keys].type.dims[2])
        self.group = draft.size(draft.graph[self.queries].type.dims[2]) // self.heads
        self.units = tuple(f"unit_{level}" for level in op.levels)
        self.leader = f"walk_k_{self.loss}"
        self.launches: list[Launch] = []
        self.buffers: list[Buffer] = []
        self.sizes: list[tuple[str, str]] = []

    def context(self, how: How, side: Side, name: str) -> EntropiesContext:
        return EntropiesContext(
            name=name,
            how=how,
            side=side,
            heads=self.heads,
            group=1 if side == "k" else self.group,
            query_group=self.group,
            head_dim=self.draft.shape.qk,
            stages=self.stages,
            temperature=self.op.temperature,
            weight=self.op.balance,
            precision=self.draft.shape.precision,
            parts={"fp32": 1, "fp16": 2}.get(self.draft.dtype, 3),
        )

    def kernel(self, how: How, side: Side | None, *, warps: int = 4) -> str:
        """A kernel, whose tiles of tokens are those that sums are of."""
        name = f"{how}_{side}_{self.loss}" if side else f"{how}_{self.loss}"
        values = [("BLOCK_E", 32)]
        if how in ("walk", "vectors", "nodes"):
            values.insert(0, ("BLOCK_M", 64))
        if name == self.leader:
            values.insert(0, ("BLOCK_T", TOKENS))
        config = Config(constexprs=tuple(values), num_warps=warps, num_stages=1)
        follows = None if name == self.leader or how == "centroids" else self.leader
        made = self.context(how, side or "k", name)
        return self.draft.kernel("learn", made, config, self.node.name, follows=follows)

    def of(self, side: Side) -> str:
        """The driver's tensor of a side."""
        return text.input_of(self.keys if side == "k" else self.queries)

    def rows(self, side: Side) -> str:
        return f"rows_{side}_{self.loss}"

    def tiles(self, side: Side) -> str:
        return f"tiles_{side}_{self.loss}"

    def read(self, side: Side) -> tuple[str, ...]:
        """Vectors, units, and what vectors keep of their way."""
        x = self.of(side)
        kept = (f"families_{side}_{self.loss}", f"stats_{side}_{self.loss}")
        return (*text.strides(x), *self.units, *kept)

    def sequences(self) -> tuple[str, ...]:
        return (*text.SEQ, f"length_{self.loss}")

    def buffer(self, name: str, *dims: str, dtype: str = "f32", zeros: bool = False) -> None:
        self.buffers.append(
            Buffer(name=name, dtype=dtype, dims=dims, role="scratch", zeros=zeros)  # type: ignore[arg-type]
        )

    def walk(self) -> None:
        """Down the tree, and the loss."""
        loss = self.loss
        levels, nodes = len(self.stages), sum(x.nodes for x in self.stages)
        k = self.of("k")
        for stage, unit, name in zip(self.stages, self.units, self.centroids, strict=True):
            self._unit(stage, unit, name)
        block_t = f'config["{self.leader}"]["BLOCK_T"]'
        self.sizes += (
            (f"length_{loss}", f"0 if batch.packed else {k}.shape[1]"),
            (self.rows("k"), f"{k}.shape[0] * {k}.shape[1]"),
            (self.rows("q"), "batch.rows"),
        )
        sides: tuple[Side, Side] = ("k", "q")
        for side in sides:
            heads = self.heads * (1 if side == "k" else self.group)
            tiles, rows = self.tiles(side), self.rows(side)
            self.sizes.append((tiles, f"{rows} // {block_t} + batch.sequences"))
            of = (str(levels), str(heads), rows)
            self.buffer(f"families_{side}_{loss}", *of, dtype="i32")
            self.buffer(f"stats_{side}_{loss}", *of, "2")
            self.buffer(f"sums_{side}_{loss}", tiles, str(self.heads), str(nodes + 1), zeros=True)
            self.launches.append(
                Launch(
                    kernel=self.kernel("walk", side),
                    grid=(tiles, str(self.heads)),
                    arguments=(
                        *self.read(side),
                        f"sums_{side}_{loss}",
                        *self.sequences(),
                        rows,
                    ),
                )
            )
        self.buffer(f"logs_{loss}", "batch.sequences", "2", str(self.heads), str(nodes))
        self.buffers.append(
            Buffer(
                name=f"rows_of_{loss}",
                dtype="f32",
                dims=(f"batch.sequences * {self.heads}", "2"),
                role="output",
            )
        )
        self.launches.append(
            Launch(
                kernel=self.kernel("balance", None),
                grid=(str(self.heads), "batch.sequences"),
                arguments=(
                    f"sums_k_{loss}",
                    f"sums_q_{loss}",
                    f"logs_{loss}",
                    f"rows_of_{loss}",
                    *self.sequences(),
                ),
            )
        )
        self._step(f"loss: {loss}")

    def _unit(self, stage: Stage, unit: str, centroids: str) -> None:
        dim, x = self.draft.shape.qk, text.input_of(centroids)
        made = TreesContext(
            name=f"of_{unit}",
            how="unit",
            heads=self.heads,
            group=self.group,
            head_dim=dim,
            nodes=stage.nodes,
            branching=stage.branching,
            leaves=stage.nodes,
        )
        config = Config(constexprs=(("BLOCK_E", 16),), num_warps=4, num_stages=1)
        self.draft.kernel("trees", made, config, self.node.name)
        self.buffer(unit, str(self.heads), str(stage.nodes), str(dim))
        self.launches.append(
            Launch(
                kernel=made.name,
                grid=(f"{stage.nodes} // {{BLOCK_E}} + 1", str(self.heads)),
                arguments=(x, f"{x}.stride(0)", f"{x}.stride(1)", unit),
            )
        )

    def _step(self, title: str) -> None:
        self.draft.steps.append(
            Step(
                title=title,
                needs=(self.queries, self.keys, *self.centroids),
                makes=(self.node.name,),
                buffers=tuple(self.buffers),
                launches=tuple(self.launches),
                sizes=tuple(self.sizes),
            )
        )
        self.buffers, self.launches, self.sizes = [], [], []

    def derive(self) -> dict[str, str]:
        """Gradients of vectors, then of centroids."""
        draft, loss = self.draft, self.loss
        dim, nodes = draft.shape.qk, sum(x.nodes for x in self.stages)
        names = (self.keys, self.queries, *self.centroids)
        made = {name: f"grad_{name}" for name in names}
        for name, buffer in made.items():
            of = text.input_of(name)
            dims = tuple(f"{of}.shape[{i}]" for i in range(len(draft.graph[name].type.dims)))
            vectors = name in names[:2]  # 0 is of what is behind a sequence's end
            dtype = "input" if vectors else "f32"  # sums over all vectors
            self.buffers.append(
                Buffer(name=buffer, dtype=dtype, dims=dims, role="output", zeros=vectors)
            )
        sums, parts = f"sums_of_{loss}", f"parts_{loss}"
        least = f"(rows_k_{loss} + rows_q_{loss}) // {TOKENS_A_PART}"
        self.sizes.append((parts, f"max(1, min({PARTS}, {least}))"))
        self.buffer(sums, parts, str(self.heads), str(nodes), str(dim), zeros=True)
        sides: tuple[Side, Side] = ("k", "q")
        for side in sides:
            grad = text.strides(made[self.keys if side == "k" else self.queries])
            self.launches.append(
                Launch(
                    kernel=self.kernel("vectors", side),
                    grid=(self.tiles(side), str(self.heads)),
                    arguments=(
                        *self.read(side),
                        f"logs_{loss}",
                        *grad,
                        *self.sequences(),
                        self.rows(side),
                    ),
                )
            )
        steps = " + ".join(f"({x.nodes} + {{BLOCK_E}} - 1) // {{BLOCK_E}}" for x in self.stages)
        for side in sides:
            self.launches.append(
                Launch(
                    kernel=self.kernel("nodes", side),
                    grid=(steps, str(self.heads), parts),
                    arguments=(
                        *self.read(side),
                        f"logs_{loss}",
                        sums,
                        *self.sequences(),
                        self.rows(side),
                        self.tiles(side),
                    ),
                )
            )
        kernel = self.kernel("centroids", None)
        for stage, name in zip(self.stages, self.centroids, strict=True):
            x = text.input_of(name)
            self.launches.append(
                Launch(
                    kernel=kernel,
                    grid=(f"{stage.nodes} // {{BLOCK_E}} + 1", str(self.heads)),
                    arguments=(
                        x,
                        f"{x}.stride(0)",
                        f"{x}.stride(1)",
                        sums,
                        made[name],
                        parts,
                        str(stage.nodes),
                        str(stage.first),
                    ),
                )
            )
        self._step(f"gradients: {loss}")
        return made
