"""Launches of a KL of pooled scores, a gate of blocks, against pooled attention, and of its gradients."""

from __future__ import annotations

from hsgen.blockgate import Gate, GateContext, How
from hsgen.graph import Divergence, Node, Norm, Pool, PoolRows, Rotate, Score
from hsgen.kernels import Turn
from hsgen.plan import Buffer, Config, ElementType, Launch, Step
from hsgen.refusals import gate_of
from hsgen.schedule import text, vectors
from hsgen.schedule.draft import Draft

ROWS = 128  # of a tile, which meet a step of keys
FEW = 32  # of operands of 32 bits
WIDE = 256  # of a head of attention: tiles of wider ones leave room for less
SHARE = 8  # scratch is such a part of the bytes of queries and outputs


def divergence(draft: Draft, node: Node, op: Divergence, *, gradients: bool) -> dict[str, str]:
    """The launches of a KL of a gate.  -> buffers of gradients by tensor"""
    planned = _Planned(draft, node, op)
    planned.score(gradients=gradients)
    return planned.back() if gradients else {}


class _Planned:
    """One gate's launches while they are planned."""

    def __init__(self, draft: Draft, node: Node, op: Divergence) -> None:
        graph, shape = draft.graph, draft.shape
        self.draft, self.node = draft, node
        self.loss = loss = node.name.removeprefix("loss.")
        score = gate_of(graph, node)
        assert score is not None, "refused"
        assert isinstance(score.op, Score)
        self.queries, self.entries = (graph[name] for name in score.inputs)
        pool = draft.pool_of(self.entries.name)
        assert pool is not None, "refused"
        assert isinstance(pool.op, Pool)
        self.pool, chain = pool, draft.finished(pool)
        self.norms = tuple(x.inputs[1] for x in chain if isinstance(x.op, Norm))
        key_turn = next((x for x in chain if isinstance(x.op, Rotate)), None)
        first = self.queries
        query_turn = first if isinstance(first.op, Rotate) else None
        if query_turn is not None:
            first = graph[query_turn.inputs[0]]
        self.rows = first if isinstance(first.op, PoolRows) else None
        self.source = graph[first.inputs[0]].name if self.rows else first.name
        self.query_turn, self.key_turn = query_turn, key_turn
        block = first.op.block if isinstance(first.op, PoolRows) else 1
        dim = draft.size(pool.type.dims[3])
        self.gate = Gate(
            loss=loss,
            rows=block or 1,
            size=op.size,
            short=draft.entries(pool.op, op.level).short,
            causal=shape.causal,
            heads=draft.size(score.type.dims[2]),
            key_heads=draft.size(pool.type.dims[2]),
            dim=dim,
            scale=1.0 if score.op.scale is None else score.op.scale,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            qk=shape.qk,
            attention_scale=op.scale if op.scale is not None else shape.qk**-0.5,
            by_heads=op.heads,
            by_tokens=op.tokens,
            by_rows=op.rows or "sum",
            how=pool.op.how,  # type: ignore[arg-type]  # refused, what has no gradient
            normed=bool(self.norms),
            key_turn=_turn(key_turn, dim, "e"),
            query_turn=_turn(query_turn, dim, "p"),
            precision=shape.precision,
        )
        self.leader = f"truth_{loss}"
        made = text.safe(self.entries.name)
        self.pool_rows, self.count = f"rows_{made}", f"count_{made}"
        self.derives = False
        self.buffers: list[Buffer] = []
        self.launches: list[Launch] = []

    def kernel(self, how: How, *, warps: int, stages: int = 1, **values: int) -> str:
        context = GateContext(
            name=f"{how}_{self.loss}", how=how, gate=self.gate, derives=self.derives
        )
        config = Config(constexprs=tuple(values.items()), num_warps=warps, num_stages=stages)
        own = {p.name for p in context.params if p.kind == "constexpr"} - values.keys()
        follows = self.leader if own else None
        return self.draft.kernel("learn", context, config, self.node.name, follows=follows)

    def scratch(self, name: str, *dims: str, dtype: str = "f32", zeros: bool = False) -> None:
        self.buffers.append(
            Buffer(name=name, dtype=dtype, dims=dims, role="scratch", zeros=zeros)  # type: ignore[arg-type]
        )

    def launch(self, kernel: str, grid: tuple[str, ...], *arguments: str) -> None:
        self.launches.append(Launch(kernel=kernel, grid=grid, arguments=arguments))

    def step(
        self,
        title: str,
        needs: tuple[str, ...],
        sizes: tuple[tuple[str, str], ...] = (),
        turns: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.draft.steps.append(
            Step(
                title=title,
                needs=needs,
                makes=(self.node.name,),
                buffers=tuple(self.buffers),
                launches=tuple(self.launches),
                sizes=sizes,
                tiles=turns[0],
                chunk=turns[1],
            )
        )
        self.buffers, self.launches = [], []

    def score(self, *, gradients: bool) -> None:
        """The divergence, and gradients of vectors that score."""
        draft, gate, loss = self.draft, self.gate, self.loss
        self.derives = gradients
        assert isinstance(self.pool.op, Pool)
        vectors.make(draft, self.pool, self.pool.op)
        for made in (self.rows, self.query_turn):
            if made is not None:
                assert isinstance(made.op, PoolRows | Rotate)
                vectors.make(draft, made, made.op)
        exact = draft.dtype == "fp32"
        rows = FEW if exact else ROWS if gate.qk <= WIDE else ROWS // 2
        wide = exact or gate.rows > 1
        units = max(1, rows // gate.rows)
        truth = self.kernel("truth", warps=8, stages=1 if exact else 3, BLOCK_U=units)
        turn, turn_units = f"turn_{loss}", f"units_{loss}"
        entries, slots = f"entries_{loss}", f"slots_{loss}"
        block_u = f'config["{truth}"]["BLOCK_U"]'
        q, k = self.node.inputs[1:3]
        heads = str(gate.heads)
        scores, target = f"scores_of_{loss}", f"target_of_{loss}"
        of_units = (heads, entries, turn_units)
        self.scratch(f"truth_of_{loss}", str(gate.query_heads), entries, slots)
        self.scratch(f"lse_of_{loss}", str(gate.query_heads), slots)
        self.scratch(scores, *of_units)
        if gradients:
            self.scratch(target, *of_units)
        self.buffers.append(
            Buffer(
                name=f"rows_of_{loss}",
                dtype="f32",
                dims=(f"blocks_of_{loss} * {heads}", "2"),
                role="output",
                zeros=True,
            )
        )
        seq = (*text.SEQ, "tile_first")
        both = (f"truth_of_{loss}", f"lse_of_{loss}")
        read = (*draft.tensor(q), *draft.tensor(k))
        self.launch(truth, ("count", str(gate.query_heads)), *read, *both, slots, entries, *seq)
        keys, vectors_of = text.buffer(self.entries.name), self._units()
        of_pool = (turn_units, entries, self.count, *seq)
        self.launch(
            self.kernel("marks", warps=8, BLOCK_N=32 if wide else 64),
            ("count", heads, f"{entries} // {{BLOCK_N}} + 1"),
            *vectors_of,
            keys,
            scores,
            *of_pool,
        )
        self.launch(
            self.kernel("shares", warps=4, BLOCK_N=16),
            ("count", heads),
            *both,
            scores,
            target if gradients else scores,
            f"rows_of_{loss}",
            slots,
            turn_units,
            entries,
            *seq,
        )
        if gradients:
            self._derive(keys, vectors_of, scores, of_pool, wide=wide)
        blocks, tiles = f"blocks_of_{loss}", f"tiles_{loss}"
        each = f"{4 * gate.query_heads * gate.rows + 8 * gate.heads} * {entries}"
        self.step(
            f"loss: {loss}",
            (q, k, *((self.source,) if self.queries.name == self.source else (self.queries.name,))),
            (
                (blocks, f"batch.rows // {gate.rows} + 2 * batch.sequences"),
                (entries, f"max(1, (batch.keys + {gate.size - 1}) // {gate.size})"),
                (tiles, f"{blocks} // {block_u} + batch.sequences"),
                (f"bytes_{loss}", f"{each} * {block_u}"),
                (f"most_{loss}", f"max(SCRATCH_BYTES, batch.rows * {draft.held // SHARE})"),
                (turn, f"min({tiles}, max(1, most_{loss} // bytes_{loss}))"),
                (turn_units, f"{turn} * {block_u}"),
                (slots, f"{turn_units} * {gate.rows}"),
            ),
            (tiles, turn),
        )

    def _units(self) -> tuple[str, ...]:
        """Queries that score, and where they lie."""
        if self.rows is not None:
            return (text.buffer(self.queries.name),)
        return self.draft.tensor(self.queries.name)

    def _derive(
        self,
        keys: str,
        vectors_of: tuple[str, ...],
        scores: str,
        of_pool: tuple[str, ...],
        *,
        wide: bool,
    ) -> None:
        """Gradients of units' queries and of entries."""
        gate, loss = self.gate, self.loss
        if self._dunits() == f"grad_{self.source}":
            self.output(self.source)
        self.scratch(
            f"dentries_{loss}",
            self.pool_rows,
            str(gate.key_heads),
            str(gate.dim),
            zeros=True,
        )
        step = 32 if wide else 64
        self.launch(
            self.kernel("of_entries", warps=8, BLOCK_N=step),
            (f"{self.pool_rows} // {{BLOCK_N}} + batch.sequences", str(gate.key_heads)),
            *vectors_of,
            scores,
            f"dentries_{loss}",
            *of_pool,
            "count",
        )
        self.launch(
            self.kernel("of_queries", warps=8, BLOCK_N=step),
            ("count", str(gate.heads)),
            keys,
            scores,
            self._dunits(),
            *of_pool,
        )

    def _dunits(self) -> str:
        """Where gradients of units' queries go: in place of these, when nothing reads them any more."""
        direct = self.rows is None and self.query_turn is None
        return f"grad_{self.source}" if direct else text.buffer(self.queries.name)

    def output(self, name: str, *, zeros: bool = True, dtype: ElementType = "input") -> str:
        """Room for a gradient of a caller's tensor."""
        x, dims = text.input_of(name), self.draft.graph[name].type.dims
        self.buffers.append(
            Buffer(
                name=f"grad_{name}",
                dtype=dtype,
                dims=tuple(f"{x}.shape[{i}]" for i in range(len(dims))),
                role="output",
                zeros=zeros,
            )
        )
        return f"grad_{name}"

    def back(self) -> dict[str, str]:
        """From vectors to what they are made of."""
        draft, gate, loss = self.draft, self.gate, self.loss
        made = {self.source: f"grad_{self.source}"}
        if self.rows is not None or self.query_turn is not None:
            grad = self.output(self.source)
            tables = self.query_turn.inputs[1:] if self.query_turn else ()
            self.launch(
                self.kernel("unpool", warps=4, BLOCK_R=32),
                ("batch.rows // {BLOCK_R} + batch.sequences", str(gate.heads)),
                self._dunits(),
                *(x for name in tables for x in draft.tensor(name)[:3]),
                *text.strides(grad),
                *text.SEQ,
            )
            self.step(f"back to rows: {loss}", (self.source, *tables))
        keys = self.pool.inputs[0]
        made[keys] = self.output(keys)
        of = (str(gate.key_heads), str(gate.dim))
        parts, before = f"parts_of_{loss}", f"before_{loss}"
        tiles = f"{self.pool_rows} // {{BLOCK_E}} + batch.sequences"
        x, heads = draft.tensor(keys), str(gate.key_heads)
        seq = (self.pool_rows, self.count, *text.SEQ)
        maps = gate.how == "max_min_mean"
        if maps or gate.normed:
            sides = "3" if maps else "1"
            self.scratch(parts, sides, self.pool_rows, *of, zeros=True)
            kernel = self.kernel("parts", warps=4, BLOCK_E=4, BLOCK_J=16)
            self.launch(kernel, (tiles, heads), *x, parts, *seq)
        weight = self.pool.inputs[1:2] if maps else ()
        tables = self.key_turn.inputs[1:] if self.key_turn else ()
        self.scratch(before, self.pool_rows, *of, zeros=True)
        finish: list[str] = []
        sizes: tuple[tuple[str, str], ...] = ()
        kernel = self.kernel("finish", warps=4, BLOCK_E=16)
        if gate.normed:
            (norm,) = self.norms
            made[norm] = f"grad_{norm}"
            programs = f"programs_{loss}"
            tile = f'config["{kernel}"]["BLOCK_E"]'
            sizes = ((programs, f"({self.pool_rows} // {tile} + batch.sequences) * {heads}"),)
            self.buffers.append(
                Buffer(
                    name=f"grad_{norm}",
                    dtype="f32",
                    dims=(programs, str(gate.dim)),
                    role="output",
                    zeros=True,
                )
            )
            finish = [parts, *map(text.input_of, weight), text.input_of(norm), f"grad_{norm}"]
        self.launch(
            kernel,
            (tiles, heads),
            *finish,
            *(each for name in tables for each in draft.tensor(name)[:3]),
            f"dentries_{loss}",
            before,
            *seq,
        )
        for name in weight:
            made[name] = self.output(name, zeros=False, dtype="f32")
            slice_ = min(64, gate.dim & -gate.dim)
            self.launch(
                self.kernel("maps", warps=4, BLOCK_N=32),
                (str(gate.dim // slice_), str(3 * gate.key_heads)),
                parts,
                before,
                made[name],
                self.pool_rows,
            )
        self.launch(
            self.kernel("tokens", warps=8, BLOCK_E=16, BLOCK_J=4),
            (tiles, heads),
            *((*x, parts, *map(text.input_of, weight)) if maps else ()),
            before,
            *text.strides(made[keys]),
            *seq,
        )
        self.step(f"back to tokens: {loss}", (keys, *weight, *self.norms, *tables), sizes)
        return made


def _turn(node: Node | None, dim: int, of: str) -> Turn | None:
    if node is None:
        return None
    assert isinstance(node.op, Rotate)
    return vectors.turn_of(node.op, dim, of)
